// Numbers and times for people.

/** Bytes as GiB: "12.4 GiB", or "120 MiB" where that is less than a tenth. */
export function gib(bytes) {
  if (bytes === null) return "unlimited";
  const value = bytes / 2 ** 30;
  if (value >= 0.1 || bytes === 0) return `${value.toFixed(1)} GiB`;
  return `${Math.max(1, Math.round(bytes / 2 ** 20))} MiB`;
}

/** Bytes of a file. */
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

/** A whole number with thousands set apart. */
export const count = (value) => value.toLocaleString("en-GB");

/** "1 picture", "2 pictures". */
export const some = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

const ENGINES = { ddp: "DDP", fsdp2: "FSDP2", zero1: "ZeRO-1", zero2: "ZeRO-2", zero3: "ZeRO-3" };

/** "2 processes, FSDP2"; null where a plan is of one process, or of an older release that knew no other. */
export const engineText = (plan) => (plan?.processes > 1 ? `${count(plan.processes)} processes, ${ENGINES[plan.engine] ?? plan.engine}` : null);

/** A time as text, in the reader's own zone: "25 Nov, 14:05". */
export function when(iso) {
  return new Date(iso).toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}
