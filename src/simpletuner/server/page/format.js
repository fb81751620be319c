// Format numbers and times.

/** Bytes as GiB: "12.4 GiB", or "120 MiB" below 0.1 GiB. */
export function gib(bytes) {
  if (bytes === null) return "unlimited";
  const value = bytes / 2 ** 30;
  if (value >= 0.1 || bytes === 0) return `${value.toFixed(1)} GiB`;
  return `${Math.max(1, Math.round(bytes / 2 ** 20))} MiB`;
}

/** A file's size in decimal units. */
export function size(bytes) {
  for (const [unit, power] of [["GB", 9], ["MB", 6], ["kB", 3]]) {
    if (bytes >= 10 ** power) return `${(bytes / 10 ** power).toFixed(1)} ${unit}`;
  }
  return `${bytes} bytes`;
}

/** Seconds as "2 h 05 min", "3 min 20 s" or "1.4 s". */
export function duration(seconds) {
  if (seconds >= 3600) {
    const minutes = Math.round(seconds / 60);
    return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  }
  if (seconds >= 60) return `${Math.floor(seconds / 60)} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  if (seconds >= 10) return `${Math.round(seconds)} s`;
  return seconds >= 0.1 || seconds === 0 ? `${seconds.toFixed(1)} s` : `${Math.max(1, Math.round(seconds * 1000))} ms`;
}

/** An integer with thousands separators. */
export const count = (value) => value.toLocaleString("en-GB");

/** "1 image", "2 images". */
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

const ENGINES = { ddp: "DDP", fsdp2: "FSDP2", zero1: "ZeRO-1", zero2: "ZeRO-2", zero3: "ZeRO-3" };

/** "2 processes, FSDP2"; null for one process, or if the plan is from an older release, which lacks this field. */
export const engineText = (plan) => (plan?.processes > 1 ? `${count(plan.processes)} processes, ${ENGINES[plan.engine] ?? plan.engine}` : null);

/** A time in the browser's time zone: "25 Nov, 14:05". */
export function when(iso) {
  return new Date(iso).toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}
