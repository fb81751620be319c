/** The first screen: the runs, the queue, and how to begin. */

import { get, post } from "./api.js";
import { button, h, icon, problemPanel, toast } from "./dom.js";
import { some, when } from "./format.js";
import { Grid, pictureUrl } from "./pictures.js";
import { QueueList } from "./queue.js";
import { go, to } from "./router.js";
import { phaseText, stateBadge, stepBar } from "./states.js";
import { short } from "./numbers.js";
import { EXAMPLE, startAndShow } from "./verbs.js";

const POLL_MS = 3000;
const THUMBNAILS = 6;

/** @param {HTMLElement} root */
export async function home(root) {
  const list = new RunList();
  const queue = new QueueList();
  const faults = h("div", { class: "stack" });
  const starter = new Starter(faults);
  const first = beginning(faults);
  const compare = button("Compare", () => go(to("compare", "", { runs: [...list.selected].join(",") })), { icon: "chart", disabled: true });
  const note = h("p", { class: "small dim grow", "aria-live": "polite" });
  const chosen = () => {
    compare.disabled = list.selected.size < 2;
    note.textContent = list.selected.size === 1 ? "Choose one more to compare." : "";
  };
  list.onSelect = chosen;
  const title = h("h1", {}, "Runs");
  const example = button("Train the example", () => guided(faults), { icon: "play", kind: "quiet" });
  const head = h("div", { class: "head" }, title, note, compare, example, starter.node);
  root.replaceChildren(head, faults, first, list.node, queue.node);

  const update = async () => {
    const [runs] = await Promise.all([get("runs"), queue.update(), starter.update()]);
    list.update(runs);
    head.hidden = first.hidden = false;
    first.hidden = runs.length > 0;
    compare.hidden = runs.length < 2;
    example.hidden = runs.length === 0;
    starter.node.hidden = runs.length === 0 || starter.isEmpty;
    chosen();
  };
  await update();
  let isLost = false;
  const timer = setInterval(async () => {
    if (document.hidden) return;
    try {
      await update();
      if (isLost) faults.replaceChildren();
      isLost = false;
    } catch (error) {
      if (!isLost) faults.replaceChildren(problemPanel(error));
      isLost = true;
    }
  }, POLL_MS);
  return () => clearInterval(timer);
}

/** What a first visit shows: two ways to begin. */
function beginning(faults) {
  const start = button("Train the example", () => guided(faults, start), { icon: "play", kind: "primary" });
  return h("section", { class: "stack", "aria-label": "How to begin", hidden: true },
    h("p", {}, "simpletuner teaches FLUX.2 what your pictures show. You give it pictures with captions; it gives you a LoRA, ",
      "a small file that every FLUX.2 tool loads. Nothing has been trained here yet."),
    h("div", { class: "ways" },
      h("article", { class: "card stack" },
        h("h2", {}, "Train the example"),
        h("p", {}, "A small FLUX.2 that comes with the program learns what a “zorblat flag” is, from 20 drawn pictures. ",
          "Nothing is downloaded, and no graphics card is needed."),
        h("ol", { class: "steps" },
          h("li", {}, "Press the button. The captions and pictures are prepared in a few seconds."),
          h("li", {}, "Watch the loss fall and the pictures change. On a processor it takes 2 to 3 minutes."),
          h("li", {}, "At the end there is a LoRA: try it on the page, and download it.")),
        h("div", {}, start)),
      h("article", { class: "card stack" },
        h("h2", {}, "Set up your own"),
        h("p", {}, "Choose a FLUX.2, name the folder with your pictures, and see what it takes of this machine before anything is loaded."),
        h("ol", { class: "steps" },
          h("li", {}, "Make an environment: every option is explained, and mistakes are said beside it."),
          h("li", {}, "Build the list of your pictures, and write their captions."),
          h("li", {}, "Start. Stop and resume whenever you like.")),
        h("div", {}, h("a", { class: "button", href: "#/configure/" }, icon("edit"), "Set up your own")))));
}

/** The guided first run. */
async function guided(faults, pressed = null) {
  if (pressed) pressed.disabled = true;
  faults.replaceChildren();
  try {
    await startAndShow({ example: EXAMPLE });
  } catch (error) {
    faults.replaceChildren(problemPanel(error));
  } finally {
    if (pressed) pressed.disabled = false;
  }
}

/** Start an environment, or put it into the queue. */
class Starter {
  constructor(faults) {
    this.faults = faults;
    this.isEmpty = true;
    this.choice = h("select", { "aria-label": "Environment" });
    this.node = h("div", { class: "row nowrap starter", hidden: true }, this.choice,
      button("Start", () => this.act(() => startAndShow({ environment: this.choice.value })), { icon: "play", kind: "primary" }),
      button("Queue", () => this.act(async () => {
        await post("queue", { environment: this.choice.value, example: null, options: {} });
        toast("It is in the queue.", "good");
      }), { icon: "queue", title: "Train it when what is before it has ended" }));
  }

  async update() {
    const environments = await get("environments");
    this.isEmpty = environments.length === 0;
    const names = environments.map(({ name }) => name);
    if (JSON.stringify(names) === this.shown) return;
    this.shown = JSON.stringify(names);
    const { value } = this.choice;
    this.choice.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === value }, name || "config/config.json")));
  }

  async act(what) {
    this.faults.replaceChildren();
    try {
      await what();
    } catch (error) {
      this.faults.replaceChildren(problemPanel(error));
    }
  }
}

/** The runs, newest first; a row is drawn again only where it changed. */
class RunList {
  constructor() {
    this.rows = new Map();
    this.selected = new Set();
    this.pictures = new Map();
    this.onSelect = () => {};
    this.list = h("ul", { class: "plain runs" });
    this.count = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.node = h("section", { "aria-label": "List of runs" }, this.count, this.list);
  }

  update(runs) {
    const said = some(runs.length, "run");
    if (this.count.textContent !== said) this.count.textContent = said;
    for (const run of this.selected) if (!runs.some((one) => one.run === run)) this.selected.delete(run);
    const nodes = runs.map((one, index) => {
      const text = JSON.stringify(one);
      const known = this.rows.get(one.run);
      if (known?.text === text) return known.node;
      const node = this.row(one);
      if (index < THUMBNAILS) this.addPicture(one, node);
      if (known?.node.contains(document.activeElement)) {
        const { does } = document.activeElement.dataset;
        requestAnimationFrame(() => node.querySelector(`[data-does="${does}"]`)?.focus());
      }
      this.rows.set(one.run, { text, node });
      return node;
    });
    if (nodes.length !== this.list.children.length || nodes.some((node, index) => node !== this.list.children[index])) {
      this.list.replaceChildren(...nodes);
    }
  }

  row(one) {
    const { run, name, state, phase, step, steps, loss, started, error, lora } = one;
    const doing = state === "running" ? phaseText(phase) : "";
    return h("li", { class: "card run-row" },
      h("input", {
        type: "checkbox", checked: this.selected.has(run), "aria-label": `Choose ${name} to compare`, dataset: { does: "choose" },
        onchange: (event) => {
          if (event.target.checked) this.selected.add(run);
          else this.selected.delete(run);
          this.onSelect();
        },
      }),
      h("div", { class: "shot" }),
      h("div", { class: "about" },
        h("div", { class: "row" }, h("h2", {}, h("a", { href: to("run", "", { run }), dataset: { does: "open" } }, name)), stateBadge(state),
          doing ? h("span", { class: "small dim" }, doing) : null, lora ? h("span", { class: "badge good" }, "LoRA") : null),
        error ? h("p", { class: "fault line" }, error.split("\n")[0]) : h("p", { class: "small dim line" }, run)),
      stepBar({ name, step, steps: steps ?? 0 }),
      h("dl", { class: "pairs small numbers" },
        h("div", {}, h("dt", {}, "Loss"), h("dd", {}, short(loss))), h("div", {}, h("dt", {}, "Started"), h("dd", {}, started ? when(started) : "–"))));
  }

  /** The newest picture of a run, asked for once a stage. */
  async addPicture({ run, name, state, phase, step }, node) {
    const stage = state === "running" ? `${phase === "validation"} ${Math.floor(step / 100)}` : state;
    const known = this.pictures.get(run);
    const picture = known?.stage === stage ? known.picture : await newestPicture(run);
    this.pictures.set(run, { stage, picture });
    if (picture) {
      node.querySelector(".shot").replaceChildren(h("img", {
        src: pictureUrl(run, picture, 160), alt: `Newest picture of ${name}`, width: picture.width, height: picture.height, loading: "lazy",
      }));
    }
  }
}

async function newestPicture(run) {
  const { validations } = await get("run", { run });
  const grid = new Grid(validations);
  return grid.isEmpty ? null : (grid.at(0, grid.steps.length - 1) ?? null);
}
