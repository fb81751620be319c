// Format measured values with few digits.

/** A number with about four significant digits: 0.2311, 12.3, 1.5e-5, 12,400; "–" for a missing value. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1000) return Math.round(value).toLocaleString("en-GB");
  if (size < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}
