/** One line chart over steps, drawn by uPlot: the page's colors, its cursor and its zoom. */

import { firstAtLeast } from "./series.js";
import uPlot from "./vendor/uPlot.esm.js";

const FONT = "12px system-ui, sans-serif";
const SPACE_PX = { x: 90, y: 28 };
const MARGIN_PX = { top: 8, right: 12, bottom: 26, left: 56 };
const DRAG_PX = 6;
const DOT_PX = 6;
const FAR_OUT = 3;
const ALIKE = 1e-6;
const WHOLE_STEPS = Array.from({ length: 10 }, (_, power) => [1, 2, 5].map((factor) => factor * 10 ** power)).flat();

/**
 * @typedef {object} Line
 * @property {string} name what the read-out calls it
 * @property {string} color name of a CSS variable
 * @property {() => {x: Float64Array, y: Float64Array, length: number}} read its points, x rising
 * @property {boolean} [faint] drawn thin and pale, behind the others
 * @property {boolean} [dots] each point marked, for the few and far between
 * @property {boolean} [dashed]
 * @property {boolean} [hidden]
 */

export class Chart {
  /**
   * @param {HTMLElement} host gives the chart its size
   * @param {Line[]} lines
   * @param {(value: number) => string} format how values are written
   * @param {{cursor: (step: number | null) => void, zoom: (view: [number, number] | null) => void}} on the pointer's wishes
   */
  constructor(host, lines, format, on) {
    Object.assign(this, { host, lines, format, on });
    this.isLogarithmic = false;
    this.leavesOutSpikes = false;
    /** The steps in sight: [first, last]. */
    this.view = [0, 1];
    /** The step the cursor is on, or null. */
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

  /** Lines, axes and zoom anew. @param {[number, number]} view */
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

  /** Move the cursor; nothing else is drawn again. @param {number | null} step */
  point(step) {
    this.cursor = step;
    if (!this.plot?.status) return; // it has no size yet, and asks again when it has
    const [first, last] = this.view;
    const isInSight = step !== null && step >= first && step <= last;
    this.plot.setCursor({ left: isInSight ? this.plot.valToPos(step, "x") : -10, top: isInSight ? 0 : -10 }, false);
  }

  /** The theme changed. */
  recolor() {
    this.plot?.redraw(false);
  }

  /** First and last step of all lines that show; null without points. */
  extent() {
    const found = this.lines.filter(({ hidden }) => !hidden).map(({ read }) => read()).filter(({ length }) => length > 0);
    if (found.length === 0) return null;
    return [Math.min(...found.map(({ x }) => x[0])), Math.max(...found.map(({ x, length }) => x[length - 1]))];
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

  /** The lines as uPlot takes them: over the steps of all of them. */
  data() {
    const tables = this.lines.map(({ read }) => {
      const { x, y, length } = read();
      return [x.subarray(0, length), drawable(y.subarray(0, length), this.isLogarithmic)];
    });
    const [[steps]] = tables;
    const areOverTheSame = tables.every(([x]) => x.buffer === steps.buffer && x.length === steps.length);
    return areOverTheSame ? [steps, ...tables.map(([, y]) => y)] : uPlot.join(tables);
  }

  /** Lowest and highest value to show, with some air around them. */
  valueRange(plot, low, high) {
    if (low === null || high === null) return this.isLogarithmic ? [0.1, 1] : [0, 1];
    if (this.leavesOutSpikes) [low, high] = withoutSpikes(plot);
    // A moving average of equal values differs in its last bits.
    const isFlat = high - low <= ALIKE * Math.max(Math.abs(low), Math.abs(high));
    if (this.isLogarithmic) return isFlat ? [low / 2, high * 2] : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
    if (isFlat) [low, high] = high === 0 ? [-1, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
    const air = (high - low) * 0.06;
    return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
  }
}

/** Lowest and highest value in sight that is not far outside the middle half, as in a box plot. */
function withoutSpikes({ series: [{ idxs: [from, to] }, ...lines], data: [, ...columns] }) {
  const shown = columns.filter((_, index) => lines[index].show);
  const values = Float64Array.from(shown.flatMap((column) => Array.from(column.slice(from, to + 1)).filter((value) => value !== null))).sort();
  const [lower, upper] = [values[values.length >> 2], values[(3 * values.length) >> 2]];
  const reach = FAR_OUT * (upper - lower);
  const last = Math.min(firstAtLeast(values, values.length, upper + reach), values.length) - 1;
  return [values[firstAtLeast(values, values.length, lower - reach)], values[last] ?? upper];
}

/** Whether a value may be written on an axis: the ends of a logarithmic one are any numbers. */
function isRound(value) {
  if (value === null) return false;
  const digits = Math.abs(value) / 10 ** Math.floor(Math.log10(Math.abs(value) || 1) - 2);
  return Math.abs(digits - Math.round(digits)) < ALIKE * 1000;
}

/** Values with null in place of those that no axis has: uPlot leaves these out. */
function drawable(values, isLogarithmic) {
  const least = isLogarithmic ? 0 : -Infinity;
  const isDrawable = (value) => value > least && value < Infinity;
  return values.every(isDrawable) ? values : Array.from(values, (value) => (isDrawable(value) ? value : null));
}

/** The point of a line that is nearest to a step, or null. */
export function pointNear(line, step) {
  const { x, y, length } = line.read();
  if (length === 0) return null;
  let index = Math.min(firstAtLeast(x, length, step), length - 1);
  if (index > 0 && step - x[index - 1] < x[index] - step) index -= 1;
  return { x: x[index], y: y[index] };
}
