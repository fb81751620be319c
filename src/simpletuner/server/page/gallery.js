/** The validation images of a run: those of one step enlarged, and all of them as a grid of prompts and steps. */

import { beforeAfter } from "./slider.js";
import { freshId, h } from "./dom.js";
import { Grid, pictureUrl } from "./pictures.js";
import { fileName, shownReferences } from "./references.js";
import { openViewer } from "./viewer.js";

export const THUMBNAIL_PX = 320;
const LARGE_PX = 1024;

const stepName = (step) => (step === 0 ? "base" : `step ${step.toLocaleString("en-GB")}`);

export class Gallery {
  /** @param {string} run @param {() => object} detail the response of `GET /api/run` */
  constructor(run, detail) {
    this.run = run;
    this.detail = detail;
    this.mark = "";
    this.grid = new Grid([]);
    this.column = -1;
    const id = freshId("step");
    this.slider = h("input", { type: "range", id, min: 0, step: 1, oninput: () => this.choose(Number(this.slider.value)) });
    this.stepOutput = h("output", { for: id, class: "numbers" });
    this.isCompared = h("input", { type: "checkbox", onchange: () => this.drawLarge() });
    this.tools = h("div", { class: "row step-tools" },
      h("label", { for: id }, "Step"), h("div", { class: "grow" }, this.slider), this.stepOutput,
      h("label", { class: "tick" }, this.isCompared, "Compare with the base (movable edge)"));
    this.large = h("div", { class: "large-pictures" });
    this.box = h("div", { class: "scroll gallery", tabindex: 0, role: "region", "aria-label": "Images by prompt and step" });
    this.all = h("details", { open: true }, h("summary", {}, "All steps"), this.box);
    this.note = h("p", { class: "dim" });
    this.news = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.node = h("section", { class: "sheet stack", "aria-label": "Images" },
      h("h2", {}, "Images"), this.note, this.tools, this.large, this.all, this.news);
    this.update();
  }

  /** Redraw if there are new images. If the newest step was chosen, the choice moves to the new one. */
  update() {
    const { validations, config, state } = this.detail();
    const mark = validations.map(({ step, pictures, attempt }) => `${step}:${pictures.length}:${attempt}`).join(" ");
    const oldGrid = this.grid;
    this.grid = new Grid(validations);
    this.note.textContent = this.grid.isEmpty ? emptyText(config, state) : "Press an image to enlarge it, beside the base or any other step.";
    for (const part of [this.tools, this.large, this.all]) part.hidden = this.grid.isEmpty;
    this.tools.hidden ||= this.grid.steps.length < 2;
    if (mark === this.mark) return;
    if (this.mark !== "" && !this.grid.isEmpty) this.news.textContent = `Images of ${stepName(this.grid.steps.at(-1))} have arrived.`;
    this.mark = mark;
    const chosen = this.column === oldGrid.steps.length - 1 ? -1 : this.grid.steps.indexOf(oldGrid.steps[this.column]);
    this.slider.max = Math.max(0, this.grid.steps.length - 1);
    this.choose(chosen === -1 ? this.grid.steps.length - 1 : chosen);
    this.drawAll();
  }

  choose(column) {
    this.column = column;
    this.slider.value = column;
    this.drawLarge();
  }

  /** Show the images of the chosen step enlarged. */
  drawLarge() {
    const { grid, column } = this;
    if (grid.isEmpty) return;
    const name = stepName(grid.steps[column]);
    this.stepOutput.value = `${name}, ${column + 1} of ${grid.steps.length}`;
    this.slider.setAttribute("aria-valuetext", this.stepOutput.value);
    this.large.replaceChildren(...grid.rows.map((row, index) => {
      const picture = grid.at(index, column);
      if (!picture) return null;
      const base = grid.at(index, 0);
      const src = (one) => pictureUrl(this.run, one, LARGE_PX);
      const image = this.isCompared.checked && base && column > 0
        ? beforeAfter({ src: src(base), label: stepName(grid.steps[0]) }, { src: src(picture), label: name }, picture)
        : this.opener(index, column, picture, LARGE_PX, "large");
      return h("figure", {}, image, h("figcaption", {}, promptText(row)));
    }).filter(Boolean));
  }

  drawAll() {
    const { grid } = this;
    const isAtEnd = this.box.scrollLeft + this.box.clientWidth >= this.box.scrollWidth - 40;
    const focused = document.activeElement?.dataset?.cell;
    const head = h("tr", {}, h("th", { scope: "col" }, "Prompt"),
      grid.steps.map((step) => h("th", { scope: "col" }, step === 0 ? "Base" : `Step ${step.toLocaleString("en-GB")}`)));
    const rows = grid.rows.map((row, index) => h("tr", {}, promptHead(row), grid.steps.map((_, column) => {
      const picture = grid.at(index, column);
      return h("td", {}, picture ? this.opener(index, column, picture, THUMBNAIL_PX, "thumb") : h("span", { class: "dim" }, "–"));
    })));
    this.box.replaceChildren(h("table", {}, h("thead", {}, head), h("tbody", {}, rows)));
    if (isAtEnd) this.box.scrollLeft = this.box.scrollWidth;
    if (focused) this.box.querySelector(`[data-cell="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  /** A button with an image, which opens the viewer. */
  opener(row, column, picture, width, kind) {
    const step = this.grid.steps[column];
    return h("button", {
      type: "button", class: kind === "thumb" ? "thumb" : "thumb large", dataset: kind === "thumb" ? { cell: `${row} ${step}` } : {},
      onclick: () => openViewer(validationViewer(this.run, this.grid, this.detail().config), row, column),
    }, h("img", {
      src: pictureUrl(this.run, picture, width), loading: "lazy", decoding: "async",
      alt: `${picture.name} at step ${step}${picture.is_ema ? ", moving average" : ""}`,
      width: picture.width, height: picture.height,
    }));
  }
}

/** A grid of validation images in the viewer's form. */
export function validationViewer(run, grid, config) {
  return {
    rows: grid.rows.length,
    columns: grid.steps.length,
    at(row, column) {
      const picture = grid.at(row, column);
      const step = grid.steps[column];
      return picture && {
        src: pictureUrl(run, picture), file: picture.path.split("/").at(-1), width: picture.width, height: picture.height,
        row: picture.name, column: step === 0 ? "step 0 (base)" : `step ${step}`,
        facts: {
          Prompt: picture.prompt,
          References: picture.references?.length ? picture.references.map(fileName).join(", ") : null,
          Seed: picture.seed,
          Size: `${picture.width} × ${picture.height}`,
          Step: step === 0 ? "0, the base model" : step,
          Weights: picture.is_ema ? "moving average" : null,
          "Sampler steps": config?.validation_num_inference_steps,
          Guidance: config?.validation_guidance,
          "True guidance": config?.validation_guidance_real > 1 ? config.validation_guidance_real : null,
        },
      };
    },
  };
}

const promptText = ({ name, prompt, references, isEma }) => [
  h("span", { class: "name" }, name), isEma ? h("span", { class: "badge" }, "moving average") : null, h("span", { class: "prompt dim" }, prompt),
  references.length ? shownReferences(references) : null,
];

/** The header cell of a row of images. */
export const promptHead = (row) => h("th", { scope: "row", title: row.prompt }, promptText(row));

function emptyText(config, state) {
  if (config?.validation_disable) return "Validation images are disabled in this run (validation_disable).";
  if (!["running", "waiting"].includes(state)) return "This run has no validation images.";
  const interval = config?.validation_step_interval;
  return `No validation images yet.${interval ? ` They are generated every ${interval} steps;` : ""} “Validate now” generates them at once.`;
}
