/** A line chart over steps, drawn by uPlot, with the page's colors, cursor and zoom. */

import { firstAtLeast } from "./series.js";
import uPlot from "./vendor/uPlot.esm.js";

const FONT = "12px system-ui, sans-serif";
const SPACE_PX = { x: 90, y: 28 };
const MARGIN_PX = { top: 8, right: 12, bottom: 26, left: 56 };
const DRAG_PX = 6;
const DOT_PX = 6;
const SPIKE_RANGES = 3;
const RELATIVE_TOLERANCE = 1e-6;
const WHOLE_STEPS = Array.from({ length: 10 }, (_, power) => [1, 2, 5].map((factor) => factor * 10 ** power)).flat();

/**
 * @typedef {object} Line
 * @property {string} name label in the readout
 * @property {string} color name of a CSS variable
 * @property {() => {x: Float64Array, y: Float64Array, length: number}} read its points, sorted by x
 * @property {boolean} [faint] thin and pale, behind the other lines
 * @property {boolean} [dots] mark each point, for sparse lines
 * @property {boolean} [dashed]
 * @property {boolean} [hidden]
 */

export class Chart {
  /**
   * @param {HTMLElement} host element that sets the chart's size
   * @param {Line[]} lines
   * @param {(value: number) => string} format formats values
   * @param {{cursor: (step: number | null) => void, zoom: (view: [number, number] | null) => void}} on callbacks for the pointer
   */
  constructor(host, lines, format, on) {
    Object.assign(this, { host, lines, format, on });
    this.isLogarithmic = false;
    this.hidesSpikes = false;
    /** The visible steps: [first, last]. */
    this.view = [0, 1];
    /** The step at the cursor, or null. */
    this.cursor = null;
    this.plot = null;
    this.resizer = new ResizeObserver(() => this.resize());
    this.resizer.observe(host);
  }

  close() {
    this.resizer.disconnect();
    this.plot?.destroy();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.host;
    if (width === 0 || height === 0) return;
    if (this.plot) this.plot.setSize({ width, height });
    else this.build();
  }

  /** Redraw lines, axes and zoom. @param {[number, number]} view */
  draw(view) {
    this.view = view;
    if (!this.plot) return;
    if (this.plot.scales.y.distr !== (this.isLogarithmic ? 3 : 1)) this.build();
    else {
      this.plot.batch(() => {
        this.lines.forEach(({ hidden }, index) => this.plot.setSeries(index + 1, { show: !hidden }, false));
        this.plot.setData(this.data());
      });
    }
  }

  /** Move the cursor without redrawing anything else. @param {number | null} step */
  point(step) {
    this.cursor = step;
    if (!this.plot?.status) return; // no size yet; the hook `ready` calls this again
    const [first, last] = this.view;
    const isVisible = step !== null && step >= first && step <= last;
    this.plot.setCursor({ left: isVisible ? this.plot.valToPos(step, "x") : -10, top: isVisible ? 0 : -10 }, false);
  }

  /** Redraw after a change of theme. */
  recolor() {
    this.plot?.redraw(false);
  }

  /** First and last step of all visible lines; null without points. */
  extent() {
    const tables = this.lines.filter(({ hidden }) => !hidden).map(({ read }) => read()).filter(({ length }) => length > 0);
    if (tables.length === 0) return null;
    return [Math.min(...tables.map(({ x }) => x[0])), Math.max(...tables.map(({ x, length }) => x[length - 1]))];
  }

  build() {
    this.plot?.destroy();
    const color = (name) => () => getComputedStyle(this.host).getPropertyValue(name);
    const axis = { stroke: color("--dim"), font: FONT, ticks: { show: false } };
    this.plot = new uPlot({
      width: this.host.clientWidth,
      height: this.host.clientHeight,
      padding: [MARGIN_PX.top, MARGIN_PX.right, 0, 0],
      legend: { show: false },
      scales: {
        x: { time: false, range: () => [this.view[0], Math.max(this.view[1], this.view[0] + 1)] },
        y: { distr: this.isLogarithmic ? 3 : 1, range: (plot, low, high) => this.valueRange(plot, low, high) },
      },
      axes: [
        { ...axis, size: MARGIN_PX.bottom, space: SPACE_PX.x, incrs: WHOLE_STEPS, grid: { show: false },
          values: (_, steps) => steps.map((step) => step.toLocaleString("en-GB")) },
        { ...axis, size: MARGIN_PX.left, space: SPACE_PX.y, grid: { stroke: color("--line"), width: 1 },
          values: (_, values) => values.map((value) => (isRound(value) ? this.format(value) : "")) },
      ],
      series: [{}, ...this.lines.map((line) => ({
        show: !line.hidden, spanGaps: true, stroke: color(line.color),
        width: line.faint ? 1 : 1.75, alpha: line.faint ? 0.35 : 1, dash: line.dashed ? [5, 4] : undefined,
        points: { size: DOT_PX, fill: color(line.color), show: () => line.dots || line.read().length === 1 },
      }))],
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false, dist: DRAG_PX },
        bind: { dblclick: () => () => this.on.zoom(null) },
      },
      hooks: {
        ready: [() => this.point(this.cursor)],
        setSelect: [(plot) => {
          const { left, width } = plot.select;
          if (width === 0) return;
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          this.on.zoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
        }],
      },
    }, this.data(), this.host);
    const { over } = this.plot;
    over.addEventListener("mousemove", ({ offsetX }) => this.on.cursor(this.plot.posToVal(offsetX, "x")));
    over.addEventListener("mouseleave", () => this.on.cursor(null));
  }

  /** The lines in uPlot's form: aligned to the steps of all lines. */
  data() {
    const tables = this.lines.map(({ read }) => {
      const { x, y, length } = read();
      return [x.subarray(0, length), drawable(y.subarray(0, length), this.isLogarithmic)];
    });
    const [[steps]] = tables;
    const haveSameSteps = tables.every(([x]) => x.buffer === steps.buffer && x.length === steps.length);
    return haveSameSteps ? [steps, ...tables.map(([, y]) => y)] : uPlot.join(tables);
  }

  /** Lowest and highest value of the axis, with some padding. */
  valueRange(plot, low, high) {
    if (low === null || high === null) return this.isLogarithmic ? [0.1, 1] : [0, 1];
    if (this.hidesSpikes) [low, high] = withoutSpikes(plot);
    // The moving average of equal values varies in its last bits.
    const isFlat = high - low <= RELATIVE_TOLERANCE * Math.max(Math.abs(low), Math.abs(high));
    if (this.isLogarithmic) return isFlat ? [low / 2, high * 2] : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
    if (isFlat) [low, high] = high === 0 ? [-1, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
    const padding = (high - low) * 0.06;
    return [low >= 0 ? Math.max(0, low - padding) : low - padding, high + padding];
  }
}

/** Lowest and highest visible value within three interquartile ranges of the quartiles, as in a box plot. */
function withoutSpikes({ series: [{ idxs: [from, to] }, ...lines], data: [, ...columns] }) {
  const shown = columns.filter((_, index) => lines[index].show);
  const values = Float64Array.from(shown.flatMap((column) => Array.from(column.slice(from, to + 1)).filter((value) => value !== null))).sort();
  const [lower, upper] = [values[values.length >> 2], values[(3 * values.length) >> 2]];
  const margin = SPIKE_RANGES * (upper - lower);
  const last = Math.min(firstAtLeast(values, values.length, upper + margin), values.length) - 1;
  return [values[firstAtLeast(values, values.length, lower - margin)], values[last] ?? upper];
}

/** Whether an axis shows a label at this value: the ends of a logarithmic axis are arbitrary numbers. */
function isRound(value) {
  if (value === null) return false;
  const digits = Math.abs(value) / 10 ** Math.floor(Math.log10(Math.abs(value) || 1) - 2);
  return Math.abs(digits - Math.round(digits)) < RELATIVE_TOLERANCE * 1000;
}

/** Replace values that the axis cannot show by null, which uPlot skips. */
function drawable(values, isLogarithmic) {
  const lowest = isLogarithmic ? 0 : -Infinity;
  const isDrawable = (value) => value > lowest && value < Infinity;
  return values.every(isDrawable) ? values : Array.from(values, (value) => (isDrawable(value) ? value : null));
}

/** The point of a line nearest to a step, or null. */
export function pointNear(line, step) {
  const { x, y, length } = line.read();
  if (length === 0) return null;
  let index = Math.min(firstAtLeast(x, length, step), length - 1);
  if (index > 0 && step - x[index - 1] < x[index] - step) index -= 1;
  return { x: x[index], y: y[index] };
}
