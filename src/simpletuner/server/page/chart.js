/**
 * One line chart on a canvas. However many points there are, each pixel column is drawn from its first, lowest, highest
 * and last value, so that 100,000 points cost as much as a few thousand. Drawn again only when something changed.
 */

import { firstAtLeast } from "./series.js";

const PADDING = { left: 56, right: 12, top: 8, bottom: 24 };
const TICK_PX = { x: 90, y: 28 };
const DOT_PX = 3.5;
const FAR_OUT = 3;
const ALIKE = 1e-6;

/**
 * @typedef {object} Line
 * @property {string} name what the read-out calls it
 * @property {string} colour name of a CSS variable
 * @property {() => {x: Float64Array, y: Float64Array, length: number}} read its points, x rising
 * @property {boolean} [faint] drawn thin and pale, behind the others
 * @property {boolean} [dots] each point marked, for the few and far between
 * @property {boolean} [dashed]
 * @property {boolean} [hidden]
 */

export class Chart {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {(value: number) => string} format how values are written
   */
  constructor(canvas, format) {
    this.canvas = canvas;
    this.format = format;
    /** @type {Line[]} */
    this.lines = [];
    this.isLogarithmic = false;
    this.leavesOutSpikes = false;
    /** The steps in sight: [first, last]; null shows all. */
    this.view = null;
    /** The step the cursor is on, or null. */
    this.cursor = null;
    /** Two steps between which a zoom is being dragged, or null. */
    this.selection = null;
    this.scheduled = 0;
    this.colours = null;
    this.resizer = new ResizeObserver(() => this.redraw());
    this.resizer.observe(canvas);
  }

  /** Draw at the next frame. */
  redraw() {
    this.scheduled ||= requestAnimationFrame(() => {
      this.scheduled = 0;
      this.draw();
    });
  }

  /** The theme changed: read the colours again. */
  recolour() {
    this.colours = null;
    this.redraw();
  }

  close() {
    cancelAnimationFrame(this.scheduled);
    this.resizer.disconnect();
  }

  /** First and last step of all lines that show; null without points. */
  extent() {
    let low = Infinity;
    let high = -Infinity;
    for (const line of this.lines) {
      if (line.hidden) continue;
      const { x, length } = line.read();
      if (length === 0) continue;
      low = Math.min(low, x[0]);
      high = Math.max(high, x[length - 1]);
    }
    return low <= high ? [low, high] : null;
  }

  /** The step under a horizontal position in CSS pixels. */
  stepAt(offset) {
    const { x0, x1, left, width } = this.frame();
    return x0 + (Math.min(Math.max(offset - left, 0), width) / width) * (x1 - x0);
  }

  frame() {
    const { clientWidth, clientHeight } = this.canvas;
    const [x0, last] = this.view ?? this.extent() ?? [0, 1];
    return {
      x0,
      x1: last > x0 ? last : x0 + 1,
      left: PADDING.left,
      top: PADDING.top,
      width: Math.max(1, clientWidth - PADDING.left - PADDING.right),
      height: Math.max(1, clientHeight - PADDING.top - PADDING.bottom),
    };
  }

  draw() {
    const { canvas } = this;
    const { clientWidth, clientHeight } = canvas;
    if (clientWidth === 0 || clientHeight === 0) return;
    const ratio = window.devicePixelRatio || 1;
    const [pixelWidth, pixelHeight] = [Math.round(clientWidth * ratio), Math.round(clientHeight * ratio)];
    if (canvas.width !== pixelWidth) canvas.width = pixelWidth;
    if (canvas.height !== pixelHeight) canvas.height = pixelHeight;
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, clientWidth, clientHeight);
    this.colours ??= readColours(canvas, this.lines);
    const frame = this.frame();
    const drawn = this.lines
      .filter((line) => !line.hidden)
      .map((line) => ({ line, columns: reduced(line.read(), frame, this.isLogarithmic) }))
      .sort((a, b) => Number(b.line.faint ?? false) - Number(a.line.faint ?? false));
    const range = valueRange(drawn.map(({ columns }) => columns), this.isLogarithmic, this.leavesOutSpikes);
    const place = placing(frame, range, this.isLogarithmic);
    this.drawGrid(pen, frame, range, place);
    pen.save();
    pen.beginPath();
    pen.rect(frame.left - DOT_PX, frame.top - DOT_PX, frame.width + 2 * DOT_PX, frame.height + 2 * DOT_PX);
    pen.clip();
    for (const { line, columns } of drawn) this.drawLine(pen, line, columns, place);
    if (this.selection) this.drawSelection(pen, frame, place);
    pen.restore();
    if (this.cursor !== null) this.drawCursor(pen, frame, place);
  }

  drawGrid(pen, frame, range, place) {
    const { colours } = this;
    pen.font = "12px system-ui, sans-serif";
    pen.lineWidth = 1;
    pen.strokeStyle = colours.grid;
    pen.fillStyle = colours.text;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const rows = Math.max(2, Math.floor(frame.height / TICK_PX.y));
    for (const value of this.isLogarithmic ? powers(range, rows) : ticks(range[0], range[1], rows)) {
      const y = Math.round(place.y(value)) + 0.5;
      pen.beginPath();
      pen.moveTo(frame.left, y);
      pen.lineTo(frame.left + frame.width, y);
      pen.stroke();
      pen.fillText(this.format(value), frame.left - 6, y);
    }
    pen.textBaseline = "top";
    for (const step of ticks(frame.x0, frame.x1, Math.max(2, Math.floor(frame.width / TICK_PX.x)))) {
      if (!Number.isInteger(step)) continue;
      const x = place.x(step);
      const text = step.toLocaleString("en-GB");
      const half = pen.measureText(text).width / 2;
      pen.textAlign = x + half > frame.left + frame.width + PADDING.right ? "right" : "center";
      pen.fillText(text, x, frame.top + frame.height + 7);
    }
  }

  drawLine(pen, line, columns, place) {
    pen.globalAlpha = line.faint ? 0.35 : 1;
    pen.strokeStyle = this.colours[line.colour];
    pen.fillStyle = pen.strokeStyle;
    pen.lineWidth = line.faint ? 1 : 1.75;
    pen.lineJoin = "round";
    pen.setLineDash(line.dashed ? [5, 4] : []);
    pen.beginPath();
    for (let index = 0; index < columns.length; index += 1) pen.lineTo(place.x(columns.x[index]), place.y(columns.y[index]));
    pen.stroke();
    pen.setLineDash([]);
    if (line.dots || columns.length === 1) {
      for (let index = 0; index < columns.length; index += 1) {
        pen.beginPath();
        pen.arc(place.x(columns.x[index]), place.y(columns.y[index]), 0.8 * DOT_PX, 0, 2 * Math.PI);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
  }

  drawSelection(pen, frame, place) {
    const [from, to] = this.selection.map(place.x);
    pen.fillStyle = this.colours.accent;
    pen.globalAlpha = 0.18;
    pen.fillRect(Math.min(from, to), frame.top, Math.abs(to - from), frame.height);
    pen.globalAlpha = 1;
  }

  drawCursor(pen, frame, place) {
    if (this.cursor < frame.x0 || this.cursor > frame.x1) return;
    const x = Math.round(place.x(this.cursor)) + 0.5;
    pen.strokeStyle = this.colours.text;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(x, frame.top);
    pen.lineTo(x, frame.top + frame.height);
    pen.stroke();
    for (const line of this.lines) {
      const point = line.hidden ? null : pointNear(line, this.cursor);
      if (!point || line.faint || !Number.isFinite(point.y)) continue;
      const y = place.y(point.y);
      if (y < frame.top || y > frame.top + frame.height) continue;
      pen.fillStyle = this.colours[line.colour];
      pen.beginPath();
      pen.arc(place.x(point.x), y, DOT_PX, 0, 2 * Math.PI);
      pen.fill();
    }
  }
}

/** The point of a line that is nearest to a step, or null. */
export function pointNear(line, step) {
  const { x, y, length } = line.read();
  if (length === 0) return null;
  let index = Math.min(firstAtLeast(x, length, step), length - 1);
  if (index > 0 && step - x[index - 1] < x[index] - step) index -= 1;
  return { x: x[index], y: y[index] };
}

/** At most four points for each pixel column of the frame, and one beyond either edge. */
export function reduced({ x, y, length }, { x0, x1, width }, isLogarithmic) {
  const from = Math.max(0, firstAtLeast(x, length, x0) - 1);
  const to = Math.min(length, firstAtLeast(x, length, x1) + 2);
  const kept = { x: new Float64Array(4 * (width + 4)), y: new Float64Array(4 * (width + 4)), length: 0 };
  if (to - from <= kept.x.length) {
    for (let index = from; index < to; index += 1) if (drawable(y[index], isLogarithmic)) push(kept, x[index], y[index]);
    return kept;
  }
  // No closure in the loop: it runs once for each of 100,000 points, several charts at a time.
  const least = isLogarithmic ? 0 : -Infinity;
  const spacing = (x1 - x0) / width;
  let index = from;
  while (index < to) {
    const edge = x0 + (Math.floor((x[index] - x0) / spacing) + 1) * spacing;
    let [first, lowest, highest, last] = [-1, -1, -1, -1];
    do {
      const value = y[index];
      if (value > least && value < Infinity) {
        if (first < 0) first = lowest = highest = index;
        else if (value < y[lowest]) lowest = index;
        else if (value > y[highest]) highest = index;
        last = index;
      }
      index += 1;
    } while (index < to && x[index] < edge);
    if (first >= 0) pushColumn(kept, x, y, [first, Math.min(lowest, highest), Math.max(lowest, highest), last]);
  }
  return kept;
}

/** The values at rising indices, each once. */
function pushColumn(kept, x, y, indices) {
  let before = -1;
  for (const index of indices) {
    if (index !== before) push(kept, x[index], y[index]);
    before = index;
  }
}

const drawable = (value, isLogarithmic) => Number.isFinite(value) && (!isLogarithmic || value > 0);

function push(kept, x, y) {
  kept.x[kept.length] = x;
  kept.y[kept.length] = y;
  kept.length += 1;
}

/** Lowest and highest value to show, with some air around them. */
export function valueRange(drawn, isLogarithmic, leavesOutSpikes) {
  const values = Float64Array.from(drawn.flatMap(({ y, length }) => Array.from(y.subarray(0, length)))).sort();
  if (values.length === 0) return isLogarithmic ? [0.1, 1] : [0, 1];
  let [low, high] = [values[0], values.at(-1)];
  if (leavesOutSpikes) {
    // Far outside the middle half, as in a box plot.
    const [lower, upper] = [values[values.length >> 2], values[(3 * values.length) >> 2]];
    const reach = FAR_OUT * (upper - lower);
    low = values[firstAtLeast(values, values.length, lower - reach)];
    high = values[Math.min(firstAtLeast(values, values.length, upper + reach), values.length) - 1] ?? high;
  }
  // A moving average of equal values differs in its last bits.
  const isFlat = high - low <= ALIKE * Math.max(Math.abs(low), Math.abs(high));
  if (isLogarithmic) return isFlat ? [low / 2, high * 2] : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
  if (isFlat) [low, high] = high === 0 ? [-1, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const air = (high - low) * 0.06;
  return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
}

function placing({ x0, x1, left, top, width, height }, [low, high], isLogarithmic) {
  const [from, to] = isLogarithmic ? [Math.log(low), Math.log(high)] : [low, high];
  return {
    x: (step) => left + ((step - x0) / (x1 - x0)) * width,
    y: (value) => top + height - (((isLogarithmic ? Math.log(value) : value) - from) / (to - from)) * height,
  };
}

/** Round numbers between two values, about `count` of them. */
export function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const spacing = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const found = [];
  for (let index = Math.ceil(low / spacing); index * spacing <= high; index += 1) found.push(index * spacing);
  return found;
}

/** The same on a logarithmic axis: powers of ten, with 2 and 5 between where there is room. */
export function powers([low, high], count) {
  const decades = Math.log10(high / low);
  const factors = decades * 3 <= count ? [1, 2, 5] : [1];
  const found = [];
  const stride = Math.max(1, Math.ceil(decades / count));
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += stride) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found.length >= 2 ? found : ticks(low, high, count);
}

function readColours(canvas, lines) {
  const style = getComputedStyle(canvas);
  const named = Object.fromEntries(lines.map(({ colour }) => [colour, style.getPropertyValue(colour)]));
  return {
    ...named,
    text: style.getPropertyValue("--dim"),
    grid: style.getPropertyValue("--line"),
    accent: style.getPropertyValue("--accent"),
  };
}
