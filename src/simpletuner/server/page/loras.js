// Which LoRAs act, and how strongly.

import { get } from "./api.js";
import { button, freshId, h, problemPanel } from "./dom.js";

export class LoraChoice {
  /** @param {string} run @param {() => void} changed called when another LoRA or strength is chosen */
  constructor(run, changed) {
    this.run = run;
    this.changed = changed;
    /** @type {{path: string, label: string, strength: number}[]} */
    this.list = [];
    this.known = [];
    this.isFilled = false;
    this.rows = h("div", { class: "stack tight" });
    this.adder = h("select", { "aria-label": "Add a LoRA", onchange: () => this.add() });
    this.node = h("fieldset", { class: "loras" }, h("legend", {}, "LoRAs"), this.rows, this.adder);
  }

  /** Ask what there is. At first, those of `kept` act as far as they are there; without any, the newest of this run. */
  async update(detail, kept) {
    try {
      this.known = await knownLoras(this.run, detail);
    } catch (error) {
      this.rows.replaceChildren(problemPanel(error));
      return;
    }
    if (!this.isFilled) {
      this.isFilled = true;
      const strengths = new Map((kept ?? []).map(({ path, strength }) => [path, strength]));
      this.list = this.known.filter(({ path }) => strengths.has(path)).map((one) => ({ ...one, strength: strengths.get(one.path) }));
      const [first] = this.known;
      if (kept === undefined && first?.label.startsWith("this run")) this.list = [{ ...first, strength: 1 }];
    }
    this.draw();
  }

  /** As the API takes them. */
  chosen() {
    return this.list.map(({ path, strength }) => ({ path, strength }));
  }

  add() {
    const found = this.known.find(({ path }) => path === this.adder.value);
    if (found) this.list.push({ ...found, strength: 1 });
    this.draw();
    this.changed();
  }

  draw() {
    this.rows.replaceChildren(...this.list.map((one) => this.row(one)));
    if (this.list.length === 0) this.rows.append(h("p", { class: "hint" }, "None: the base model draws."));
    const left = this.known.filter(({ path }) => !this.list.some((one) => one.path === path));
    this.adder.replaceChildren(h("option", { value: "" }, left.length ? "Add a LoRA …" : "No other LoRA is there"),
      ...left.map(({ path, label }) => h("option", { value: path }, label)));
    this.adder.disabled = left.length === 0;
  }

  /** One LoRA. Among several, each has a weight of its own, which the strengths multiply. */
  row(one) {
    const id = freshId("weight");
    const weight = h("input", {
      type: "number", id, min: -10, max: 10, step: 0.05, value: one.strength,
      oninput: () => {
        one.strength = Number(weight.value);
      },
    });
    const isAlone = this.list.length === 1 && one.strength === 1;
    return h("div", { class: "lora" },
      h("span", { class: "grow" }, one.label),
      isAlone ? null : h("label", { class: "row nowrap small", for: id }, "Weight", weight),
      button("", () => {
        this.list.splice(this.list.indexOf(one), 1);
        this.draw();
        this.changed();
      }, { icon: "close", kind: "quiet tiny", label: `Leave out ${one.label}` }));
  }
}

/** LoRAs that can be chosen: those of this run, then the finished ones of others. */
async function knownLoras(run, detail) {
  const [checkpoints, runs] = await Promise.all([get("run/checkpoints", { run }), get("runs")]);
  const own = detail.config?.model_type === "full" ? [] : checkpoints
    .filter(({ state }) => state !== "damaged")
    .map(({ step, path }) => ({ path, label: `this run, step ${step}` }))
    .reverse();
  const finished = runs.filter(({ lora }) => lora).map((other) => ({
    path: `${other.run}/${other.lora}`, label: other.run === run ? "this run, finished" : `${other.name}, finished`, isOwn: other.run === run,
  }));
  return [...finished.filter(({ isOwn }) => isOwn), ...own, ...finished.filter(({ isOwn }) => !isOwn)];
}
