/**
 * Columns of numbers by step, which grow at the end. A repeated step (of a later attempt) replaces the old row.
 */

const INITIAL_CAPACITY = 1024;

/** Typed columns of equal length; `step` is always one of them. */
export class Series {
  /** @param {string[]} names columns besides `step` */
  constructor(names) {
    this.names = names;
    this.length = 0;
    /** Rises at each change, so that derived data can tell when it is stale. */
    this.version = 0;
    /** Averages of this series; each is notified of the first stale row. */
    this.averages = [];
    this.column = Object.fromEntries(["step", ...names].map((name) => [name, new Float64Array(INITIAL_CAPACITY)]));
  }

  /** Replace all columns by those of `GET /api/run/series`. Missing and null values become NaN, which the charts skip. */
  fill(columns) {
    const { length } = columns.step;
    const capacity = Math.max(INITIAL_CAPACITY, 2 ** Math.ceil(Math.log2(length + 1)));
    for (const name of ["step", ...this.names]) {
      const values = new Float64Array(capacity);
      const column = columns[name] ?? [];
      for (let index = 0; index < length; index += 1) values[index] = column[index] ?? NaN;
      this.column[name] = values;
    }
    this.length = length;
    this.changed(0);
  }

  /** Add one row, or replace the row of the same step. @param {{step: number}} row */
  put(row) {
    const index = this.length > 0 && row.step <= this.column.step[this.length - 1] ? this.at(row.step) : this.length;
    const isNew = index === this.length || this.column.step[index] !== row.step;
    if (isNew) this.open(index);
    for (const name of ["step", ...this.names]) this.column[name][index] = row[name] ?? NaN;
    this.changed(index);
  }

  changed(index) {
    this.version += 1;
    for (const average of this.averages) average.done = Math.min(average.done, index);
  }

  /** Insert an empty row at `index`. */
  open(index) {
    if (this.length === this.column.step.length) {
      for (const [name, old] of Object.entries(this.column)) {
        this.column[name] = new Float64Array(old.length * 2);
        this.column[name].set(old);
      }
    }
    if (index < this.length) {
      for (const values of Object.values(this.column)) values.copyWithin(index + 1, index, this.length);
    }
    this.length += 1;
  }

  /** Index of the first row whose step is at least `step`; `length` if there is none. */
  at(step) {
    return firstAtLeast(this.column.step, this.length, step);
  }

  /** Index of the row nearest to `step`, or -1 if there is no row. */
  nearest(step) {
    if (this.length === 0) return -1;
    const after = this.at(step);
    if (after === 0) return 0;
    if (after === this.length) return this.length - 1;
    const { step: steps } = this.column;
    return steps[after] - step < step - steps[after - 1] ? after : after - 1;
  }

  /** The last value of a column, or NaN. */
  last(name) {
    return this.length > 0 ? this.column[name][this.length - 1] : NaN;
  }

  /** The median of the last `count` values of a column, or NaN. */
  recentMedian(name, count) {
    const values = this.column[name].slice(Math.max(0, this.length - count), this.length).sort();
    return values.length > 0 ? values[values.length >> 1] : NaN;
  }
}

/** Index of the first of `length` rising values that is at least `limit`. */
export function firstAtLeast(values, length, limit) {
  let low = 0;
  let high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < limit) low = middle + 1;
    else high = middle;
  }
  return low;
}

/**
 * Exponential moving average of a column: a value loses half its weight every `halfLife` steps, however far apart the
 * rows are; the first values are not biased toward zero. It grows with the series and recomputes only changed rows.
 */
export class Smoothed {
  constructor(series, name) {
    this.series = series;
    this.name = name;
    this.halfLife = 0;
    this.values = new Float64Array(0);
    this.sums = new Float64Array(0);
    this.weights = new Float64Array(0);
    this.done = 0;
    series.averages.push(this);
  }

  /** The averages, one per row of the series. */
  read(halfLife) {
    const { series } = this;
    const capacity = series.column.step.length;
    if (halfLife !== this.halfLife || this.values.length > capacity) this.done = 0;
    this.halfLife = halfLife;
    if (this.values.length !== capacity) {
      for (const key of ["values", "sums", "weights"]) {
        const grown = new Float64Array(capacity);
        grown.set(this[key].subarray(0, Math.min(this.done, capacity)));
        this[key] = grown;
      }
    }
    for (let index = this.done; index < series.length; index += 1) this.extend(index);
    this.done = series.length;
    return this.values;
  }

  extend(index) {
    const { step } = this.series.column;
    const value = this.series.column[this.name][index];
    const previous = index > 0 ? index - 1 : -1;
    const distance = previous < 0 ? 1 : step[index] - step[previous];
    const decay = this.halfLife > 0 ? 0.5 ** (distance / this.halfLife) : 0;
    const sum = previous < 0 ? 0 : this.sums[previous];
    const weight = previous < 0 ? 0 : this.weights[previous];
    const counts = Number.isFinite(value);
    this.sums[index] = counts ? decay * sum + (1 - decay) * value : sum;
    this.weights[index] = counts ? decay * weight + (1 - decay) : weight;
    this.values[index] = this.weights[index] > 0 ? this.sums[index] / this.weights[index] : NaN;
  }
}
