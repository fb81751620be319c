/** The first screen: the runs, the queue, and two ways to begin. */

import { get, post } from "./api.js";
import { button, h, icon, problemPanel, toast } from "./dom.js";
import { followRuns, updateRuns } from "./feed.js";
import { MachineLine } from "./meter.js";
import { QueueList } from "./queue.js";
import { go, to } from "./router.js";
import { RunList } from "./runlist.js";
import { EXAMPLE, startAndShow } from "./verbs.js";

/** @param {HTMLElement} root */
export async function home(root) {
  const list = new RunList(updateRuns);
  const machine = new MachineLine();
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
  const example = button("Train the example", () => trainExample(faults), { icon: "play", kind: "quiet" });
  const head = h("div", { class: "head" }, title, note, compare, example, starter.node);
  root.replaceChildren(head, machine.node, faults, first, list.node, queue.node);

  const update = async (runs) => {
    await Promise.all([queue.update(), starter.update()]);
    list.update(runs);
    head.hidden = first.hidden = false;
    first.hidden = runs.length > 0;
    compare.hidden = runs.length < 2;
    example.hidden = runs.length === 0;
    starter.node.hidden = runs.length === 0 || starter.isEmpty;
    chosen();
  };
  await update(await updateRuns());
  let isLost = false;
  const leave = followRuns(async (runs, failed) => {
    if (document.hidden) return;
    try {
      if (failed) throw failed;
      await update(runs);
      if (isLost) faults.replaceChildren();
      isLost = false;
    } catch (error) {
      if (!isLost) faults.replaceChildren(problemPanel(error));
      isLost = true;
    }
  });
  return () => {
    leave();
    machine.close();
  };
}

/** The two ways to begin, shown while there are no runs. */
function beginning(faults) {
  const start = button("Train the example", () => trainExample(faults, start), { icon: "play", kind: "primary" });
  return h("section", { class: "stack", "aria-label": "How to begin", hidden: true },
    h("p", {}, "simpletuner trains FLUX.2 on your images. From images with captions it makes a LoRA, ",
      "a small file that FLUX.2 tools load. There are no runs here yet."),
    h("div", { class: "ways" },
      h("article", { class: "card stack" },
        h("h2", {}, "Train the example"),
        h("p", {}, "A small built-in FLUX.2 learns what a “zorblat flag” is from 20 drawn images. ",
          "It needs no download and no GPU."),
        h("ol", { class: "steps" },
          h("li", {}, "Press the button. Preparing the captions and images takes a few seconds."),
          h("li", {}, "Watch the loss fall and the validation images change. On a CPU it takes 2 to 3 minutes."),
          h("li", {}, "Try the finished LoRA on this page. It works with this small FLUX.2 only.")),
        h("div", {}, start)),
      h("article", { class: "card stack" },
        h("h2", {}, "Set up your own"),
        h("p", {}, "Choose a FLUX.2 model and the folder with your images, and see how much memory and time training needs before anything is loaded."),
        h("ol", { class: "steps" },
          h("li", {}, "Create an environment: every option is explained, and problems are shown beside it."),
          h("li", {}, "Add your images and write their captions."),
          h("li", {}, "Start. Stop and resume whenever you like.")),
        h("div", {}, h("a", { class: "button", href: "#/configure/" }, icon("edit"), "Set up your own")))));
}

/** Train the example. */
async function trainExample(faults, pressed = null) {
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

/** The controls that start or queue an environment. */
class Starter {
  constructor(faults) {
    this.faults = faults;
    this.isEmpty = true;
    this.choice = h("select", { "aria-label": "Environment" });
    this.node = h("div", { class: "row nowrap starter", hidden: true }, this.choice,
      button("Start", () => this.act(() => startAndShow({ environment: this.choice.value })), { icon: "play", kind: "primary" }),
      button("Queue", () => this.act(async () => {
        await post("queue", { environment: this.choice.value, example: null, options: {} });
        toast("Added to the queue.", "good");
      }), { icon: "queue", title: "Starts once the runs before it in the queue have ended" }));
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

  async act(action) {
    this.faults.replaceChildren();
    try {
      await action();
    } catch (error) {
      this.faults.replaceChildren(problemPanel(error));
    }
  }
}
