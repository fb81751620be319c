/** The list of runs, a row per run: searched by text, filtered by state, sorted, and shown in portions. */

import { get } from "./api.js";
import { button, freshId, h } from "./dom.js";
import { count, plural, when } from "./format.js";
import { deleteRun, editNote } from "./note.js";
import { short } from "./numbers.js";
import { Grid, pictureUrl } from "./pictures.js";
import { to } from "./router.js";
import { STATES, isActive, phaseText, stateBadge, stepBar } from "./states.js";

const ROWS_PER_PORTION = 40;
const THUMBNAILS = 6;
const THUMBNAIL_PX = 96;

const ORDERS = {
  started: ["newest first", () => 0],
  name: ["by name", (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true })],
  loss: ["lowest loss first", (a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity) || 0],
  state: ["by state", (a, b) => STATES.indexOf(a.state) - STATES.indexOf(b.state)],
};

/** The last filter; it survives leaving the screen. */
const filter = { text: "", state: "", order: "started" };

export class RunList {
  /** @param {() => Promise<any>} refresh loads the runs again */
  constructor(refresh) {
    this.refresh = refresh;
    this.runs = [];
    this.limit = ROWS_PER_PORTION;
    this.rows = new Map();
    this.selected = new Set();
    this.pictures = new Map();
    this.onSelect = () => {};
    this.list = h("ul", { class: "plain runs" });
    this.count = h("p", { class: "small dim", "aria-live": "polite" });
    this.more = button("Show more", () => {
      const first = this.list.children.length;
      this.limit += ROWS_PER_PORTION;
      this.draw();
      this.list.children[first]?.querySelector("a")?.focus();
    });
    this.tools = h("div", { class: "row run-tools", hidden: true },
      labeled("Find", h("input", { type: "search", value: filter.text, placeholder: "name or note", oninput: ({ target }) => this.filterBy({ text: target.value }) })),
      labeled("State", this.select(filter.state, { "": "all", ...Object.fromEntries(STATES.map((state) => [state, state])) }, (state) => this.filterBy({ state }))),
      labeled("Sort", this.select(filter.order, Object.fromEntries(Object.entries(ORDERS).map(([key, [text]]) => [key, text])), (order) => this.filterBy({ order }))),
      this.count);
    this.node = h("section", { class: "stack", "aria-label": "List of runs" }, this.tools, this.list, h("div", {}, this.more));
  }

  select(value, options, onchange) {
    return h("select", { onchange: ({ target }) => onchange(target.value) },
      Object.entries(options).map(([key, text]) => h("option", { value: key, selected: key === value }, text)));
  }

  filterBy(change) {
    Object.assign(filter, change);
    this.limit = ROWS_PER_PORTION;
    this.draw();
  }

  update(runs) {
    this.runs = runs;
    for (const run of this.selected) if (!runs.some((one) => one.run === run)) this.selected.delete(run);
    this.tools.hidden = runs.length < 2;
    this.draw();
  }

  draw() {
    const text = filter.text.trim().toLocaleLowerCase();
    const matches = this.runs
      .filter(({ run, name, note, state }) => (filter.state === "" || state === filter.state)
        && `${name}\n${run}\n${note}`.toLocaleLowerCase().includes(text))
      .sort(ORDERS[filter.order][1]);
    const countText = matches.length === this.runs.length ? plural(matches.length, "run") : `${count(matches.length)} of ${plural(this.runs.length, "run")}`;
    if (this.count.textContent !== countText) this.count.textContent = countText;
    const hidden = matches.length - this.limit;
    this.more.hidden = hidden <= 0;
    this.more.lastChild.textContent = `Show ${Math.min(ROWS_PER_PORTION, hidden)} more of ${count(hidden)}`;
    const nodes = matches.slice(0, this.limit).map((one, index) => this.rowOf(one, index));
    if (nodes.length !== this.list.children.length || nodes.some((node, index) => node !== this.list.children[index])) {
      const focused = document.activeElement;
      this.list.replaceChildren(...nodes);
      if (focused?.isConnected) focused.focus(); // moving a row drops the focus
    }
  }

  /** The row of a run, rebuilt only if the run changed. */
  rowOf(run, index) {
    const hasThumbnail = index < THUMBNAILS;
    const text = `${hasThumbnail} ${JSON.stringify(run)}`;
    const cached = this.rows.get(run.run);
    if (cached?.text === text) return cached.node;
    const node = this.row(run);
    if (hasThumbnail) this.addThumbnail(run, node);
    if (cached?.node.contains(document.activeElement)) {
      const { does } = document.activeElement.dataset;
      requestAnimationFrame(() => node.querySelector(`[data-does="${does}"]`)?.focus());
    }
    this.rows.set(run.run, { text, node });
    return node;
  }

  row(one) {
    const { run, name, state, phase, step, steps, loss, started, error, lora, note } = one;
    const activity = state === "running" ? phaseText(phase) : "";
    const tool = (label, icon, action, onPress) => button("", onPress, { icon, kind: "quiet tiny", label: `${label} ${name}`, dataset: { does: action } });
    return h("li", { class: "run-row" },
      h("input", {
        type: "checkbox", checked: this.selected.has(run), "aria-label": `Choose ${name} to compare`, dataset: { does: "choose" },
        onchange: (event) => {
          if (event.target.checked) this.selected.add(run);
          else this.selected.delete(run);
          this.onSelect();
        },
      }),
      h("div", { class: "shot" }),
      h("p", { class: "line about" },
        h("a", { href: to("run", "", { run }), dataset: { does: "open" }, title: run }, name),
        error ? h("span", { class: "small fault", title: error }, error.split("\n")[0]) : null,
        note ? h("span", { class: "small dim", title: note }, note) : null),
      h("p", { class: "row nowrap states" }, stateBadge(state), activity ? h("span", { class: "small dim line" }, activity) : null,
        lora ? h("span", { class: "badge good" }, "LoRA") : null),
      stepBar({ name, step, steps: steps ?? 0 }),
      h("p", { class: "small numbers loss" }, h("span", { class: "visually-hidden" }, "Loss "), short(loss)),
      h("p", { class: "small dim numbers started" }, h("span", { class: "visually-hidden" }, "Started "), started ? when(started) : "–"),
      h("div", { class: "row nowrap tools" },
        tool("Note on", "edit", "note", async () => {
          if (await editNote(one)) await this.refresh();
        }),
        isActive(state) ? null : tool("Delete", "trash", "delete", async () => {
          if (!(await deleteRun(one))) return;
          await this.refresh();
          (this.list.querySelector("a") ?? document.getElementById("main")).focus();
        })));
  }

  /** Show the newest image of a run, loaded once per stage. */
  async addThumbnail({ run, name, state, phase, step }, node) {
    const stage = state === "running" ? `${phase === "validation"} ${Math.floor(step / 100)}` : state;
    const cached = this.pictures.get(run);
    const picture = cached?.stage === stage ? cached.picture : await newestImage(run);
    this.pictures.set(run, { stage, picture });
    if (picture) {
      node.querySelector(".shot").replaceChildren(h("img", {
        src: pictureUrl(run, picture, THUMBNAIL_PX), alt: `Newest image of ${name}`, width: picture.width, height: picture.height, loading: "lazy",
      }));
    }
  }
}

function labeled(text, field) {
  field.id = freshId("runs");
  return h("div", { class: "row nowrap" }, h("label", { class: "small", for: field.id }, text), field);
}

async function newestImage(run) {
  const { validations } = await get("run", { run });
  const grid = new Grid(validations);
  return grid.isEmpty ? null : (grid.at(0, grid.steps.length - 1) ?? null);
}
