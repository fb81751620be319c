/** The validation images of a run as a grid: a row per prompt, a column per step. */

import { address } from "./api.js";

/** The address of an image of a run; with `width`, of its thumbnail. */
export const pictureUrl = (run, picture, width = null) => address("run/file", { run, path: picture.path, width });

/** The key of an image's row, which is the same at all steps. */
const rowKey = ({ name, width, height, seed, is_ema }) => `${name} ${width}x${height} ${seed} ${is_ema}`;

export class Grid {
  /** @param {object[]} validations events, oldest first: a later attempt replaces the images of the same steps */
  constructor(validations) {
    const cells = new Map();
    const steps = new Set();
    this.rows = [];
    for (const { step, pictures } of validations) {
      for (const picture of pictures) {
        const key = rowKey(picture);
        if (!cells.has(key)) {
          cells.set(key, new Map());
          this.rows.push({ key, name: picture.name, prompt: picture.prompt, references: picture.references ?? [], isEma: picture.is_ema, seed: picture.seed });
        }
        cells.get(key).set(step, picture);
        steps.add(step);
      }
    }
    this.steps = [...steps].sort((a, b) => a - b);
    this.cells = cells;
  }

  /** The image at a row and a column, or undefined. */
  at(row, column) {
    return this.cells.get(this.rows[row]?.key)?.get(this.steps[column]);
  }

  get isEmpty() {
    return this.rows.length === 0;
  }
}
