/** The gallery of a run: prompts down, steps across, the base first. */

import { h } from "./dom.js";
import { Grid, pictureUrl } from "./pictures.js";
import { openViewer } from "./viewer.js";

export const THUMBNAIL_PX = 320;

export class Gallery {
  /** @param {string} run @param {() => object} detail the answer of `GET /api/run` */
  constructor(run, detail) {
    this.run = run;
    this.detail = detail;
    this.shown = "";
    this.box = h("div", { class: "scroll gallery", tabindex: 0, role: "region", "aria-label": "Pictures by prompt and step" });
    this.note = h("p", { class: "dim" });
    this.news = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.node = h("section", { class: "sheet stack", "aria-label": "Pictures" }, h("h2", {}, "Pictures"), this.note, this.box, this.news);
    this.update();
  }

  /** Draw the grid again where pictures came. */
  update() {
    const { validations, config, state } = this.detail();
    const grid = new Grid(validations);
    const mark = validations.map(({ step, pictures, attempt }) => `${step}:${pictures.length}:${attempt}`).join(" ");
    this.note.textContent = grid.isEmpty ? emptyText(config, state) : "Press a picture to see it whole, beside the base or any other step.";
    this.box.hidden = grid.isEmpty;
    if (mark === this.shown) return;
    const isAtEnd = this.box.scrollLeft + this.box.clientWidth >= this.box.scrollWidth - 40;
    const focused = document.activeElement?.dataset?.cell;
    if (this.shown !== "" && !grid.isEmpty) this.news.textContent = `Pictures of step ${grid.steps.at(-1)} are there.`;
    this.shown = mark;
    this.box.replaceChildren(this.table(grid));
    if (isAtEnd) this.box.scrollLeft = this.box.scrollWidth;
    if (focused) this.box.querySelector(`[data-cell="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  table(grid) {
    const head = h("tr", {}, h("th", { scope: "col" }, "Prompt"),
      grid.steps.map((step) => h("th", { scope: "col" }, step === 0 ? "Base" : `Step ${step.toLocaleString("en-GB")}`)));
    const rows = grid.rows.map((row, index) =>
      h("tr", {},
        promptHead(row),
        grid.steps.map((step, column) => h("td", {}, this.cell(grid, index, column)))));
    return h("table", {}, h("thead", {}, head), h("tbody", {}, rows));
  }

  cell(grid, row, column) {
    const picture = grid.at(row, column);
    if (!picture) return h("span", { class: "dim" }, "–");
    const step = grid.steps[column];
    return h("button", {
      type: "button", class: "thumb", dataset: { cell: `${row} ${step}` },
      onclick: () => openViewer(grid, row, column, { run: this.run, config: this.detail().config }),
    }, h("img", {
      src: pictureUrl(this.run, picture, THUMBNAIL_PX), loading: "lazy", decoding: "async",
      alt: `${picture.name} at step ${step}${picture.is_ema ? ", moving average" : ""}`,
      width: picture.width, height: picture.height,
    }));
  }
}

/** The head of a row of pictures. */
export function promptHead({ name, prompt, isEma }) {
  return h("th", { scope: "row", title: prompt }, h("span", { class: "name" }, name),
    isEma ? h("span", { class: "badge" }, "moving average") : null, h("span", { class: "prompt dim" }, prompt));
}

function emptyText(config, state) {
  if (config?.validation_disable) return "Pictures are switched off in this run (validation_disable).";
  if (!["running", "waiting"].includes(state)) return "This run drew no pictures.";
  const every = config?.validation_step_interval;
  return `No pictures yet.${every ? ` They come every ${every} steps;` : ""} “Validate now” draws them at once.`;
}
