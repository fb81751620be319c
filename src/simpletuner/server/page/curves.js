/** The charts of one or more runs, with a shared cursor and zoom, a readout of values, a table and CSV. */

import { Chart, pointNear } from "./chart.js";
import { button, freshId, h } from "./dom.js";
import { short } from "./numbers.js";
import { Smoothed } from "./series.js";
import { saveValues, valueTable } from "./values.js";

/**
 * @typedef {object} Shown a run on the charts
 * @property {string} name
 * @property {number} color number of one of the page's `--part-…` colors, from 1
 * @property {import("./series.js").Series} steps
 * @property {import("./series.js").Series} heldOut
 * @property {import("./series.js").Series} drift
 * @property {boolean} [hidden]
 */

const HALF_LIVES = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];

const CHARTS = [
  { key: "loss", title: "Loss", canBeLogarithmic: true, big: true },
  { key: "held_out", title: "Held-out loss", canBeLogarithmic: true, big: true },
  { key: "drift", title: "Drift from the base", big: true, isOptional: true },
  { key: "lr", title: "Learning rate" },
  { key: "grad_norm", title: "Gradient norm", canBeLogarithmic: true },
  { key: "seconds", title: "Seconds per step", unit: " s", canBeLogarithmic: true },
  { key: "memory_gib", title: "Peak memory", unit: " GiB" },
];

export class Curves {
  /** @param {Shown[]} runs */
  constructor(runs) {
    this.runs = runs;
    this.view = null;
    this.cursor = null;
    this.halfLife = null;
    this.averages = new Map(runs.map((run) => [run, new Smoothed(run.steps, "loss")]));
    this.panels = CHARTS.map((spec) => this.panel(spec));
    this.position = h("span", { class: "numbers dim" });
    this.table = h("div", { class: "scroll values" });
    this.tableBox = h("details", { class: "sheet", ontoggle: () => this.fillTable() }, h("summary", {}, "Values as a table"), this.table);
    const charts = (big) => h("div", { class: "charts" }, this.panels.filter(({ spec }) => (spec.big ?? false) === big).map(({ node }) => node));
    /** The charts shown first: the losses and drift. */
    this.losses = h("div", { class: "stack" }, this.toolbar(), charts(true));
    /** The other charts and the table of values. */
    this.others = h("div", { class: "stack" }, charts(false), this.tableBox);
    this.isStale = true;
    this.recolor = () => this.panels.forEach(({ chart }) => chart.recolor());
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.scheme.addEventListener("change", this.recolor);
    document.addEventListener("theme", this.recolor);
    this.update();
  }

  close() {
    this.scheme.removeEventListener("change", this.recolor);
    document.removeEventListener("theme", this.recolor);
    for (const { chart } of this.panels) chart.close();
  }

  /** Redraw after new points, or after a run was shown or hidden. */
  update() {
    for (const panel of this.panels) {
      for (const line of panel.chart.lines) line.hidden = line.run.hidden ?? false;
      panel.node.hidden = panel.spec.isOptional === true && panel.chart.extent() === null;
    }
    this.redraw();
    if (this.tableBox.open) this.fillTable();
  }

  toolbar() {
    const smoothing = freshId("smoothing");
    const halfLifeOutput = h("output", { class: "numbers dim", for: smoothing });
    const slider = h("input", {
      type: "range", id: smoothing, min: 0, max: HALF_LIVES.length - 1, step: 1, value: 4,
      oninput: () => {
        this.halfLife = HALF_LIVES[slider.value];
        this.redraw();
      },
    });
    this.showHalfLife = () => {
      const halfLife = this.chosenHalfLife();
      slider.value = HALF_LIVES.indexOf(halfLife);
      halfLifeOutput.value = halfLife === 0 ? "off" : `half-life ${halfLife} ${halfLife === 1 ? "step" : "steps"}`;
      slider.setAttribute("aria-valuetext", halfLifeOutput.value);
    };
    const tick = (text, act) => h("label", { class: "tick" }, h("input", { type: "checkbox", onchange: (event) => act(event.target.checked) }), text);
    this.whole = button("Whole run", () => this.zoom(null), { icon: "reset", kind: "quiet", disabled: true });
    return h(
      "div",
      { class: "row curves-tools" },
      h("label", { for: smoothing }, "Smoothing"), slider, halfLifeOutput,
      tick("Logarithmic", (on) => {
        for (const { chart, spec } of this.panels) chart.isLogarithmic = on && (spec.canBeLogarithmic ?? false);
        this.redraw();
      }),
      tick("Hide spikes", (on) => {
        for (const { chart } of this.panels) chart.hidesSpikes = on;
        this.redraw();
      }),
      this.position,
      h("span", { class: "grow" }),
      this.whole,
      button("CSV", () => saveValues(this.runs), { icon: "download", kind: "quiet", title: "Download all values of all steps" }),
    );
  }

  /** The chosen half-life; by default about a fiftieth of the steps. */
  chosenHalfLife() {
    if (this.halfLife !== null) return this.halfLife;
    const longest = Math.max(...this.runs.map(({ steps }) => steps.length));
    return HALF_LIVES.findLast((one) => one <= Math.max(2, longest / 50));
  }

  linesOf(key, run) {
    const isAlone = this.runs.length === 1;
    const color = `--part-${run.color}`;
    const column = (series, name) => () => ({ x: series.column.step, y: series.column[name], length: series.length });
    const named = (text) => (isAlone ? text : run.name);
    if (key === "loss") {
      const smooth = () => ({
        x: run.steps.column.step, y: this.averages.get(run).read(this.chosenHalfLife()), length: run.steps.length,
      });
      return [
        ...(isAlone ? [{ run, name: "raw", color, faint: true, read: column(run.steps, "loss") }] : []),
        { run, name: named("smoothed"), color, read: smooth },
      ];
    }
    if (key === "held_out" || key === "drift") {
      const [series, live, average] = key === "drift" ? [run.drift, "drift", "ema_drift"] : [run.heldOut, "loss", "ema_loss"];
      return [
        { run, name: named("live weights"), color, dots: true, read: column(series, live) },
        { run, name: isAlone ? "moving average" : `${run.name}, moving average`, color: isAlone ? "--part-2" : color,
          dots: true, dashed: true, optional: true, read: column(series, average) },
      ];
    }
    return [{ run, name: named(""), color, read: column(run.steps, key) }];
  }

  panel(spec) {
    const ids = { title: freshId("chart"), text: freshId("chart") };
    const plot = h("div", {
      class: "plot", tabindex: 0, role: "slider", "aria-labelledby": ids.title, "aria-describedby": ids.text,
      "aria-orientation": "horizontal", onkeydown: (event) => this.onKey(event),
    });
    const chart = new Chart(plot, this.runs.flatMap((run) => this.linesOf(spec.key, run)), short, {
      cursor: (step) => {
        if (step !== null || document.activeElement !== plot) this.moveTo(step);
      },
      zoom: (view) => this.zoom(view),
    });
    const readout = h("div", { class: "readout numbers" });
    const summary = h("p", { class: "visually-hidden", id: ids.text });
    const node = h("figure", { class: `chart sheet${spec.big ? " big" : ""}` },
      h("figcaption", {}, h("h2", { id: ids.title }, spec.title), readout), plot, summary);
    return { spec, node, plot, chart, readout, summary };
  }

  onKey(event) {
    const [first, last] = this.range();
    const stride = Math.max(1, Math.round((last - first) / 200)) * (event.shiftKey ? 10 : 1);
    const position = this.cursor ?? last;
    const moves = {
      ArrowLeft: position - stride, ArrowDown: position - stride, ArrowRight: position + stride, ArrowUp: position + stride,
      PageDown: position - stride * 20, PageUp: position + stride * 20, Home: first, End: last,
    };
    const width = last - first;
    if (event.key in moves) this.moveTo(Math.min(Math.max(moves[event.key], first), last));
    else if (event.key === "+") this.zoom([position - width / 4, position + width / 4]);
    else if (event.key === "-") this.zoom([position - width, position + width]);
    else if (event.key === "Escape") {
      this.cursor = null;
      this.zoom(null);
    } else return;
    event.preventDefault();
  }

  moveTo(step) {
    this.cursor = step === null ? null : Math.round(step);
    this.schedule();
  }

  zoom(view) {
    const [first, last] = this.everything();
    const within = view && [Math.max(first, view[0]), Math.min(last, view[1])];
    this.view = within && within[1] - within[0] >= 1 && within[1] - within[0] < last - first ? within : null;
    this.redraw();
  }

  /** First and last step of all runs. */
  everything() {
    const extents = this.panels.map(({ chart }) => chart.extent()).filter((one) => one !== null);
    return extents.length ? [Math.min(...extents.map(([low]) => low)), Math.max(...extents.map(([, high]) => high))] : [0, 1];
  }

  range() {
    return this.view ?? this.everything();
  }

  /** Schedule an update of points, lines and zoom. */
  redraw() {
    this.isStale = true;
    this.schedule();
  }

  /** Schedule an update of charts and texts for the cursor, at most once per frame. */
  schedule() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      const view = this.range();
      if (this.isStale) {
        this.showHalfLife();
        this.whole.disabled = this.view === null;
        for (const { chart, node } of this.panels) if (!node.hidden) chart.draw(view);
        this.isStale = false;
      }
      this.position.textContent = this.cursor === null ? "" : `Step ${this.cursor.toLocaleString("en-GB")}`;
      for (const panel of this.panels) {
        panel.chart.point(this.cursor);
        this.read(panel, view);
      }
    });
  }

  /** The values under the cursor, or the last ones. */
  read({ spec, chart, plot, readout, summary }, view) {
    const unit = spec.unit ?? "";
    const lines = chart.lines.filter((line) => !line.hidden);
    const points = lines
      .map((line) => ({ line, point: pointNear(line, this.cursor ?? Infinity) }))
      .filter(({ line, point }) => point && (Number.isFinite(point.y) || !line.optional));
    readout.replaceChildren(
      ...points.map(({ line, point }) => {
        const otherStep = this.cursor !== null && point.x !== this.cursor ? ` at ${point.x.toLocaleString("en-GB")}` : "";
        return h("span", { class: "reading" },
          h("i", { class: line.faint ? "swatch faint" : "swatch", style: { background: `var(${line.color})` } }),
          line.name ? `${line.name} ` : "", h("b", {}, short(point.y) + unit), h("span", { class: "dim" }, otherStep));
      }),
      ...(spec.key === "held_out" && this.runs.length === 1 ? bestOf(this.runs[0].heldOut) : []),
    );
    if (points.length === 0) readout.append(h("span", { class: "dim" }, ["held_out", "drift"].includes(spec.key) ? "not measured yet" : "no step yet"));
    const text = points.map(({ line, point }) => `${line.name} ${short(point.y)}${unit}`.trim()).join(", ") || "no value yet";
    plot.setAttribute("aria-valuemin", Math.floor(view[0]));
    plot.setAttribute("aria-valuemax", Math.ceil(view[1]));
    plot.setAttribute("aria-valuenow", this.cursor ?? Math.ceil(view[1]));
    plot.setAttribute("aria-valuetext", `step ${this.cursor ?? Math.ceil(view[1])}: ${text}`);
    summary.textContent = `Line chart over steps ${Math.floor(view[0])} to ${Math.ceil(view[1])}. ${lines.map((line) => lineText(line, unit)).join(" ")}
      Arrow keys move the cursor, plus and minus zoom, Escape shows all.`;
  }

  fillTable() {
    if (this.tableBox.open) this.table.replaceChildren(...this.runs.filter((run) => !run.hidden).map(valueTable));
  }
}

/** A line in words: its first and last value. */
function lineText(line, unit) {
  const { x, y, length } = line.read();
  if (length === 0) return "";
  const last = length - 1;
  return `${line.name || "Value"}: ${short(y[0])}${unit} at step ${x[0]}, ${short(y[last])}${unit} at step ${x[last]}.`;
}

function bestOf(heldOut) {
  let best = -1;
  const { step, loss } = heldOut.column;
  for (let index = 0; index < heldOut.length; index += 1) if (best < 0 || loss[index] < loss[best]) best = index;
  if (heldOut.length < 2) return [];
  return [h("span", { class: "reading dim" }, `base ${short(loss[0])}, best ${short(loss[best])} at ${step[best].toLocaleString("en-GB")}`)];
}
