/** Compare two or more runs: curves, validation images and configuration differences. */

import { freshId, h } from "./dom.js";
import { Curves } from "./curves.js";
import { CURVES, RunStore } from "./events.js";
import { promptHead, validationViewer } from "./gallery.js";
import { Grid, pictureUrl } from "./pictures.js";
import { to } from "./router.js";
import { short } from "./numbers.js";
import { stateBadge } from "./states.js";
import { openViewer } from "./viewer.js";

const COLORS = 8;
const IMAGE_PX = 768;

/** @param {HTMLElement} root @param {{runs?: string}} params `runs`: comma-separated paths */
export async function compare(root, params) {
  const names = [...new Set((params.runs ?? "").split(",").filter(Boolean))];
  if (names.length < 2) {
    root.replaceChildren(h("h1", {}, "Compare"), h("div", { class: "sheet empty" },
      h("h2", {}, "Choose two runs"), h("p", {}, "Tick two or more runs in the list, then press Compare."),
      h("a", { class: "button primary", href: "#/" }, "Go to the runs")));
    return () => {};
  }
  const stores = names.map((name) => new RunStore(name));
  try {
    await Promise.all(stores.map((store) => store.open()));
  } catch (error) {
    for (const store of stores) store.close();
    throw error;
  }
  const shown = stores.map((store, index) => ({
    name: store.detail.name, color: (index % COLORS) + 1, steps: store.steps, heldOut: store.heldOut, drift: store.drift, hidden: false, store,
  }));
  tellApart(shown);
  const curves = new Curves(shown);
  const legend = h("div", { class: "row legend", role: "group", "aria-label": "Shown runs" });
  const pictures = new SideBySide(shown);
  const differences = h("section", { class: "sheet stack", "aria-label": "Configuration" });
  const drawLegend = () => legend.replaceChildren(...shown.map((run) => legendItem(run, () => {
    curves.update();
    pictures.update();
  })));
  drawLegend();
  pictures.update();
  differences.replaceChildren(h("h2", {}, "Configuration differences"), configTable(shown));
  root.replaceChildren(
    h("h1", {}, "Compare"), legend, curves.losses, curves.others, pictures.node, differences,
  );
  for (const store of stores) {
    store.subscribe((topics) => {
      if (CURVES.some((topic) => topics.has(topic))) curves.update();
      if (topics.has("validations")) pictures.update();
    });
  }
  return () => {
    curves.close();
    for (const store of stores) store.close();
  };
}

/** Name runs by their paths where two have the same name. */
function tellApart(shown) {
  const names = shown.map(({ name }) => name);
  shown.forEach((run, index) => {
    if (names.filter((name) => name === names[index]).length > 1) run.name = run.store.run;
  });
}

function legendItem(run, changed) {
  const { detail } = run.store;
  const lossText = run.store.heldOut.length ? `held-out ${short(run.store.heldOut.last("loss"))}` : `loss ${short(run.store.steps.last("loss"))}`;
  return h("label", { class: "tick legend-item" },
    h("input", {
      type: "checkbox", checked: !run.hidden,
      onchange: (event) => {
        run.hidden = !event.target.checked;
        changed();
      },
    }),
    h("i", { class: "swatch", style: { background: `var(--part-${run.color})` } }), run.name, stateBadge(detail.state),
    h("span", { class: "dim small numbers" }, lossText),
    h("a", { class: "small", href: to("run", "", { run: run.store.run }), "aria-label": `Open ${run.name}` }, "open"));
}

/** The options whose values differ between the runs. */
function differing(configs) {
  const keys = [...new Set(configs.flatMap((config) => Object.keys(config ?? {})))].sort();
  return keys.filter((key) => new Set(configs.map((config) => JSON.stringify(config?.[key]))).size > 1);
}

function configTable(shown) {
  const configs = shown.map(({ store }) => store.detail.config);
  const keys = differing(configs);
  if (keys.length === 0) return h("p", { class: "dim" }, "None: the configurations are the same.");
  const valueText = (value) => (value === undefined ? "–" : typeof value === "string" ? value || "“”" : JSON.stringify(value));
  return h("div", { class: "scroll values", tabindex: 0, role: "region", "aria-label": "Options that differ" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Option"), shown.map(({ name }) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, keys.map((key) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, key)),
      configs.map((config) => h("td", { class: "mono" }, valueText(config?.[key]))))))));
}

/** Validation images of one step: a row per prompt, a column per run. */
class SideBySide {
  constructor(shown) {
    this.runs = shown;
    this.step = null;
    this.mark = "";
    const id = freshId("step");
    this.steps = [];
    this.choice = h("input", {
      type: "range", id, min: 0, step: 1,
      oninput: () => {
        this.step = this.steps[Number(this.choice.value)];
        this.mark = "";
        this.update();
      },
    });
    this.stepOutput = h("output", { for: id, class: "numbers" });
    this.body = h("div", { class: "scroll gallery by-run", tabindex: 0, role: "region", "aria-label": "Images by prompt and run" });
    this.chooser = h("div", { class: "row step-tools" }, h("label", { for: id }, "Step"), h("div", { class: "grow" }, this.choice), this.stepOutput);
    this.node = h("section", { class: "sheet stack", "aria-label": "Images" }, h("div", { class: "head" }, h("h2", {}, "Images"), this.chooser), this.body);
  }

  update() {
    const runs = this.runs.filter((run) => !run.hidden);
    const grids = runs.map(({ store }) => new Grid(store.detail.validations));
    const steps = [...new Set(grids.flatMap((grid) => grid.steps))].sort((a, b) => a - b);
    const mark = JSON.stringify([runs.map(({ name }) => name), grids.map((grid) => [grid.steps, grid.rows.length])]);
    if (mark === this.mark) return;
    this.mark = mark;
    this.chooser.hidden = steps.length === 0;
    if (steps.length === 0) {
      this.body.replaceChildren(h("p", { class: "dim" }, "These runs have no validation images."));
      return;
    }
    const inAll = steps.filter((step) => grids.every((grid) => grid.steps.includes(step)));
    const step = steps.includes(this.step) ? this.step : (inAll.at(-1) ?? steps.at(-1));
    this.steps = steps;
    this.choice.max = steps.length - 1;
    this.choice.value = steps.indexOf(step);
    this.stepOutput.value = step === 0 ? "base" : `step ${step}`;
    this.choice.setAttribute("aria-valuetext", this.stepOutput.value);
    this.body.style.setProperty("--columns", runs.length);
    const prompts = new Map(grids.flatMap((grid) => grid.rows.map((row) => [`${row.prompt} ${row.isEma}`, row])));
    this.body.replaceChildren(h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Prompt"), runs.map(({ name }) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, [...prompts.values()].map((row) => h("tr", {},
        promptHead(row),
        grids.map((grid, index) => h("td", {}, picture(grid, row, step, runs[index]))))))));
  }
}

function picture(grid, { prompt, isEma }, step, { name, store }) {
  const row = grid.rows.findIndex((one) => one.prompt === prompt && one.isEma === isEma);
  const column = grid.steps.indexOf(step);
  const image = grid.at(row, column);
  if (!image) return h("span", { class: "dim" }, "–");
  return h("button", {
    type: "button", class: "thumb large", onclick: () => openViewer(validationViewer(store.run, grid, store.detail.config), row, column),
  },
  h("img", {
    src: pictureUrl(store.run, image, IMAGE_PX), loading: "lazy", alt: `${image.name} of ${name} at step ${step}`,
    width: image.width, height: image.height,
  }));
}
