// The values of a run as a table, also for screen readers, and as CSV.

import { saveFile } from "./api.js";
import { h } from "./dom.js";
import { short } from "./numbers.js";

const ROWS = 100;

const COLUMNS = { step: "Step", loss: "Loss", lr: "Learning rate", grad_norm: "Gradient norm", seconds: "Seconds", memory_gib: "Peak memory, GiB" };

/** A table of at most a hundred evenly spaced steps. @param {import("./curves.js").Shown} run */
export function valueTable({ name, steps }) {
  const stride = Math.max(1, Math.ceil(steps.length / ROWS));
  const rows = [];
  for (let index = steps.length - 1; index >= 0; index -= stride) {
    rows.push(h("tr", {}, Object.keys(COLUMNS).map((key) =>
      h(key === "step" ? "th" : "td", { class: "number", scope: key === "step" ? "row" : null }, short(steps.column[key][index])))));
  }
  const selection = stride === 1 ? "every step" : `one step in ${stride}; the CSV has all`;
  return h("table", {},
    h("caption", {}, `${name}: ${selection}, newest first`),
    h("thead", {}, h("tr", {}, Object.values(COLUMNS).map((title) => h("th", { class: "number", scope: "col" }, title)))),
    h("tbody", {}, rows));
}

/** All values of a run as CSV, a line per step. */
function csvOf({ steps, heldOut, drift }) {
  const [, ...names] = Object.keys(COLUMNS);
  const groups = [[steps, names], [heldOut, ["loss", "ema_loss"]], [drift, ["drift", "ema_drift"]]];
  const cells = (series, keys, step) => {
    const at = series.at(step);
    const hasStep = at < series.length && series.column.step[at] === step;
    return keys.map((key) => (hasStep && Number.isFinite(series.column[key][at]) ? String(series.column[key][at]) : ""));
  };
  const all = new Set(groups.flatMap(([{ column, length }]) => [...column.step.subarray(0, length)]));
  const rows = [...all].sort((a, b) => a - b).map((step) => [step, ...groups.flatMap(([series, keys]) => cells(series, keys, step))]);
  return [["step", ...names, "held_out_loss", "held_out_ema_loss", "drift", "ema_drift"], ...rows].map((row) => `${row.join(",")}\n`).join("");
}

/** Save the values of runs as one file; with several runs, the first column is the run's name. */
export function saveValues(runs) {
  const [{ name }] = runs;
  if (runs.length === 1) saveText(`${name.replaceAll("/", "-")}.csv`, csvOf(runs[0]));
  else saveText("compare.csv", runs.map((run, index) => named(run, index === 0)).join(""));
}

function named(run, hasHead) {
  const [head, ...lines] = csvOf(run).trimEnd().split("\n");
  const cell = `"${run.name.replaceAll('"', '""')}"`;
  return [...(hasHead ? [`run,${head}`] : []), ...lines.map((line) => `${cell},${line}`)].map((line) => `${line}\n`).join("");
}

const saveText = (name, text) => saveFile(name, new Blob([text], { type: "text/csv" }));
