// The values of a run in writing: a table for eyes and screen readers, and CSV for other programs.

import { saveFile } from "./api.js";
import { h } from "./dom.js";
import { short } from "./numbers.js";

const ROWS = 100;

const COLUMNS = { step: "Step", loss: "Loss", lr: "Learning rate", grad_norm: "Gradient norm", seconds: "Seconds", memory_gib: "Peak memory, GiB" };

/** A table of at most a hundred steps, evenly apart. @param {import("./curves.js").Shown} run */
export function valueTable({ name, steps }) {
  const stride = Math.max(1, Math.ceil(steps.length / ROWS));
  const rows = [];
  for (let index = steps.length - 1; index >= 0; index -= stride) {
    rows.push(h("tr", {}, Object.keys(COLUMNS).map((key) =>
      h(key === "step" ? "th" : "td", { class: "number", scope: key === "step" ? "row" : null }, short(steps.column[key][index])))));
  }
  const every = stride === 1 ? "every step" : `one step in ${stride}; the CSV has all`;
  return h("table", {},
    h("caption", {}, `${name}: ${every}, newest first`),
    h("thead", {}, h("tr", {}, Object.values(COLUMNS).map((title) => h("th", { class: "number", scope: "col" }, title)))),
    h("tbody", {}, rows));
}

/** Every value of a run as CSV; held-out losses stand on the line of their step. */
function csvOf({ steps, heldOut }) {
  const names = Object.keys(COLUMNS);
  const lines = [[...names, "held_out_loss", "held_out_ema_loss"].join(",")];
  const number = (value) => (Number.isFinite(value) ? String(value) : "");
  let measured = 0;
  const heldOutUpTo = (step) => {
    while (measured < heldOut.length && heldOut.column.step[measured] < step) {
      lines.push([heldOut.column.step[measured], ",,,,", ...held(measured)].join(","));
      measured += 1;
    }
  };
  const held = (index) => [number(heldOut.column.loss[index]), number(heldOut.column.ema_loss[index])];
  for (let index = 0; index < steps.length; index += 1) {
    const step = steps.column.step[index];
    heldOutUpTo(step);
    const isMeasured = measured < heldOut.length && heldOut.column.step[measured] === step;
    lines.push([...names.map((name) => number(steps.column[name][index])), ...(isMeasured ? held(measured) : ["", ""])].join(","));
    if (isMeasured) measured += 1;
  }
  heldOutUpTo(Infinity);
  return `${lines.join("\n")}\n`;
}

/** Save the values of runs as one file; of several, the name stands in the first column. */
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
