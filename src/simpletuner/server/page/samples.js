// Images generated to try LoRAs: a grid per prompt, with a row per seed and a column per strength, the base first.

import { address, get } from "./api.js";
import { button, h, icon, problemPanel } from "./dom.js";
import { openViewer } from "./viewer.js";

const SHOWN_AT_FIRST = 8;
const IMAGE_PX = 768;

/** The parameters that all images of a grid share. */
const keyOf = ({ prompt, references, width, height, steps, guidance }) => JSON.stringify([prompt, references, width, height, steps, guidance]);

/** The names of an image's reference images; null if there are none. */
const referencesText = ({ references }) => (references?.length ? references.map(({ name }) => name).join(", ") : null);

/** The active LoRAs as a key of the column; an empty list for the base. */
const columnOf = ({ loras }) => JSON.stringify(loras.filter(({ strength }) => strength !== 0).map(({ name, sha256, strength }) => [sha256 ?? name, strength]));

/**
 * Arrange images in grids, ordered by first appearance.
 * @param {object[]} pictures the first of each cell counts; one without a path is still to be generated
 * @param {string} baseLabel label of a column without LoRAs
 */
export function gridsOf(pictures, baseLabel) {
  const grids = new Map();
  for (const one of pictures) {
    const key = keyOf(one);
    if (!grids.has(key)) grids.set(key, { about: one, cells: new Map(), seeds: new Set(), columns: new Map() });
    const grid = grids.get(key);
    const column = columnOf(one);
    grid.seeds.add(one.seed);
    if (!grid.columns.has(column)) grid.columns.set(column, one.loras.filter(({ strength }) => strength !== 0));
    const cell = `${one.seed} ${column}`;
    if (!grid.cells.has(cell)) grid.cells.set(cell, one);
  }
  return [...grids.values()].map((grid) => arranged(grid, baseLabel));
}

function arranged({ about, cells, seeds, columns }, baseLabel) {
  const rows = [...seeds].sort((a, b) => a - b);
  const order = [...columns].sort(([, a], [, b]) => {
    const names = (loras) => loras.map(({ sha256, name }) => sha256 ?? name).join();
    return a.length - b.length || names(a).localeCompare(names(b)) || (a[0]?.strength ?? 0) - (b[0]?.strength ?? 0);
  });
  const distinct = new Set([...columns.values()].flat().map(({ sha256, name }) => sha256 ?? name)).size;
  const named = ({ name, sha256, strength }) => {
    const shortName = name.replace(/^pytorch_lora_weights\.safetensors$/, "LoRA").replace(/\.safetensors$/, "");
    return distinct > 1 ? `${shortName}${shortName === "LoRA" && sha256 ? ` ${sha256.slice(0, 6)}` : ""} at ${strength}` : `Strength ${strength}`;
  };
  return {
    about, rows: rows.length, seeds: rows, columns: order.length,
    labels: order.map(([, loras]) => loras.map(named).join(" + ") || baseLabel),
    picture: (row, column) => cells.get(`${rows[row]} ${order[column]?.[0]}`),
    at(row, column) {
      const one = this.picture(row, column);
      return one?.path ? this.shown(one, column) : undefined;
    },
    shown(one, column) {
      return {
        src: address("picture", { path: one.path }), file: one.path.split("/").at(-1), width: one.width, height: one.height,
        row: one.seed === null ? (one.prompt ?? one.path) : `Seed ${one.seed}`, column: this.labels[column].toLowerCase(),
        facts: {
          Prompt: one.prompt, References: referencesText(one), Seed: one.seed, Size: `${one.width} × ${one.height}`, "Sampler steps": one.steps, Guidance: one.guidance,
          LoRAs: one.loras.map(({ name, strength }) => `${name} at ${strength}`).join(", ") || "none",
        },
      };
    },
  };
}

/** A grid as a table; pressing an image opens the viewer. */
export function gridTable(grid) {
  const { about } = grid;
  const facts = [referencesText(about) && `from ${referencesText(about)}`, `${about.width} × ${about.height}`, about.steps && `${about.steps} steps`, about.guidance !== null && `guidance ${about.guidance}`];
  const cell = (row, column) => {
    const one = grid.picture(row, column);
    if (!one) return h("td", {}, h("span", { class: "dim" }, "–"));
    if (!one.path) return h("td", {}, h("div", { class: "to-come", style: { aspectRatio: `${one.width} / ${one.height}` } }, h("span", { class: "small dim" }, "to be generated")));
    const { src, file } = grid.shown(one, column);
    return h("td", {},
      h("button", { type: "button", class: "thumb large", onclick: () => openViewer(grid, row, column) },
        h("img", {
          src: address("picture", { path: one.path, width: IMAGE_PX }), loading: "lazy", width: one.width, height: one.height,
          alt: `${one.prompt ?? file}, ${grid.labels[column].toLowerCase()}, seed ${one.seed}`,
        })),
      h("a", { class: "button quiet tiny square", href: src, download: file, title: "Download", "aria-label": `Download ${file}` }, icon("download")));
  };
  const rows = Array.from({ length: grid.rows }, (_, row) => h("tr", {},
    h("th", { scope: "row" }, h("span", { class: "small" }, grid.seeds[row] === null ? "" : `Seed ${grid.seeds[row]}`)),
    grid.labels.map((_label, column) => cell(row, column))));
  const table = h("table", {},
    h("thead", {}, h("tr", {}, h("td", {}), grid.labels.map((label) => h("th", { scope: "col" }, label)))), h("tbody", {}, rows));
  table.style.setProperty("--columns", grid.columns);
  return h("figure", { class: "drawn" },
    h("figcaption", {}, h("p", {}, about.prompt ?? about.path), h("p", { class: "small dim numbers" }, facts.filter(Boolean).join(" · "))),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Images of ${about.prompt ?? "a prompt"}` }, table));
}

export class Samples {
  /** @param {string} run @param {() => string} baseLabel label of images without LoRAs */
  constructor(run, baseLabel) {
    this.run = run;
    this.baseLabel = baseLabel;
    this.limit = SHOWN_AT_FIRST;
    this.list = [];
    /** Paths shown elsewhere on the screen; null if none are. */
    this.except = null;
    this.body = h("div", { class: "stack" });
    this.more = button("Show more", () => {
      this.limit *= 2;
      this.draw();
    }, { kind: "quiet" });
    this.node = h("section", { class: "sheet stack", "aria-label": "Samples" }, h("h2", {}, "Samples"), this.body, this.more);
  }

  /** Load the list of generated images. */
  async update() {
    try {
      this.list = await get("run/samples", { run: this.run });
      this.draw();
    } catch (error) {
      this.body.replaceChildren(problemPanel(error));
    }
  }

  draw() {
    const grids = gridsOf(this.list.filter(({ path }) => !this.except?.has(path)), this.baseLabel());
    this.more.hidden = grids.length <= this.limit;
    this.node.hidden = grids.length === 0 && this.except !== null;
    this.body.replaceChildren(...grids.slice(0, this.limit).map(gridTable));
    if (grids.length === 0) {
      this.body.replaceChildren(h("p", { class: "dim" },
        "None yet. Describe an image and press Generate; the images are kept in the run's folder “samples”."));
    }
  }
}
