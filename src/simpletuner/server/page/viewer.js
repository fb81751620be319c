/** One picture of a gallery, whole: what it was drawn from, the one before and after, and any other beside it. */

import { beforeAfter } from "./slider.js";
import { dialog, h, icon, freshId } from "./dom.js";
import { pictureUrl } from "./pictures.js";

/**
 * Open the viewer.
 * @param {import("./pictures.js").Grid} grid
 * @param {number} row @param {number} column where to begin
 * @param {{run: string, config: object}} of
 */
export function openViewer(grid, row, column, { run, config }) {
  const body = h("div", { class: "viewer" });
  let other = null; // null: the base, or the first there is; "none": nothing
  let box = null;

  const move = (down, right) => {
    const rows = grid.rows.length;
    const columns = grid.steps.length;
    let [nextRow, nextColumn] = [row, column];
    for (let tries = 0; tries < rows * columns; tries += 1) {
      nextRow = Math.min(Math.max(nextRow + down, 0), rows - 1);
      nextColumn = Math.min(Math.max(nextColumn + right, 0), columns - 1);
      if (grid.at(nextRow, nextColumn)) break;
      if ((down && (nextRow === 0 || nextRow === rows - 1)) || (right && (nextColumn === 0 || nextColumn === columns - 1))) return;
    }
    [row, column] = [nextRow, nextColumn];
    show();
  };

  const show = () => {
    const picture = grid.at(row, column);
    const step = grid.steps[column];
    const choices = grid.steps.map((one, index) => ({ step: one, picture: grid.at(row, index) })).filter((one) => one.picture && one.step !== step);
    const against = other === "none" ? undefined : (choices.find((one) => one.step === other) ?? choices[0]);
    const label = (one) => (one === 0 ? "step 0 (base)" : `step ${one}`);
    const chooser = freshId("against");
    const full = pictureUrl(run, picture);
    const select = h("select", {
      id: chooser,
      onchange: () => {
        other = select.value === "none" ? "none" : Number(select.value);
        show();
        body.querySelector("select").focus();
      },
    },
    h("option", { value: "none", selected: against === undefined }, "nothing"),
    choices.map((one) => h("option", { value: one.step, selected: one === against }, label(one.step))));
    const arrow = (text, name, down, right) => h("button", {
      type: "button", class: "quiet square", "aria-label": text, title: text, onclick: () => move(down, right),
    }, icon(name));
    body.style.setProperty("--aspect", picture.width / picture.height);
    body.replaceChildren(
      against
        ? beforeAfter({ src: pictureUrl(run, against.picture), label: label(against.step) }, { src: full, label: label(step) }, picture)
        : h("img", { class: "whole", src: full, alt: `${picture.name} at ${label(step)}`, width: picture.width, height: picture.height }),
      h("div", { class: "stack" },
        h("div", { class: "row" },
          arrow("Step before", "left", 0, -1), arrow("Step after", "right", 0, 1), arrow("Prompt above", "up", -1, 0), arrow("Prompt below", "down", 1, 0)),
        h("div", { class: "row" }, h("label", { for: chooser }, "Compare with"), h("div", { class: "grow" }, select)),
        facts(picture, step, config),
        h("a", { class: "button", href: full, download: picture.path.split("/").at(-1) }, icon("download"), "Download the picture")),
    );
    if (box) box.querySelector("h2").textContent = `${picture.name}, ${label(step)}`;
  };

  show();
  return dialog({
    title: `${grid.at(row, column).name}, step ${grid.steps[column]}`,
    body,
    wide: true,
    actions: [{ label: "Close", value: null }],
    opened(opened) {
      box = opened;
      const rest = () => box.querySelector(".actions button").focus({ preventScroll: true });
      show();
      box.addEventListener("keydown", (event) => {
        if (event.target.matches("input, select")) return;
        const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
        if (!(event.key in moves)) return;
        event.preventDefault();
        move(...moves[event.key]);
        rest();
      });
      rest();
    },
  });
}

/** What a picture was drawn from. */
export function facts(picture, step, config) {
  const rows = {
    Prompt: picture.prompt,
    Seed: picture.seed,
    Size: `${picture.width} × ${picture.height}`,
    Step: step === 0 ? "0, the base model" : step,
    Weights: picture.is_ema ? "moving average" : null,
    "Sampler steps": config?.validation_num_inference_steps,
    Guidance: config?.validation_guidance,
    "True guidance": config?.validation_guidance_real > 1 ? config.validation_guidance_real : null,
  };
  return h("dl", { class: "facts" },
    Object.entries(rows).filter(([, value]) => value !== null && value !== undefined)
      .flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));
}
