// The choice of active LoRAs and their strengths.

import { get } from "./api.js";
import { button, freshId, h, problemPanel } from "./dom.js";
import { LIMITS } from "./limits.js";

export class LoraChoice {
  /** @param {string} run @param {() => void} changed called when a LoRA is added or removed */
  constructor(run, changed) {
    this.run = run;
    this.changed = changed;
    /** @type {{path: string, label: string, strength: number}[]} */
    this.list = [];
    this.available = [];
    this.isFilled = false;
    this.rows = h("div", { class: "stack tight" });
    this.adder = h("select", { "aria-label": "Add a LoRA", onchange: () => this.add() });
    this.node = h("fieldset", { class: "loras" }, h("legend", {}, "LoRAs"), this.rows, this.adder);
  }

  /** Load the available LoRAs. The first call activates the available ones of `stored`; without `stored`, the newest of this run. */
  async update(detail, stored) {
    try {
      this.available = await availableLoras(this.run, detail);
    } catch (error) {
      this.rows.replaceChildren(problemPanel(error));
      return;
    }
    if (!this.isFilled) {
      this.isFilled = true;
      const strengths = new Map((stored ?? []).map(({ path, strength }) => [path, strength]));
      this.list = this.available.filter(({ path }) => strengths.has(path)).map((one) => ({ ...one, strength: strengths.get(one.path) }));
      const [first] = this.available;
      if (stored === undefined && first?.label.startsWith("this run")) this.list = [{ ...first, strength: 1 }];
    }
    this.draw();
  }

  /** The active LoRAs as the API accepts them. */
  chosen() {
    return this.list.map(({ path, strength }) => ({ path, strength }));
  }

  add() {
    const lora = this.available.find(({ path }) => path === this.adder.value);
    if (lora) this.list.push({ ...lora, strength: 1 });
    this.draw();
    this.changed();
  }

  draw() {
    this.rows.replaceChildren(...this.list.map((one) => this.row(one)));
    if (this.list.length === 0) this.rows.append(h("p", { class: "hint" }, "None: the base model is used."));
    const inactive = this.available.filter(({ path }) => !this.list.some((one) => one.path === path));
    this.adder.replaceChildren(h("option", { value: "" }, inactive.length ? "Add a LoRA …" : "There is no other LoRA"),
      ...inactive.map(({ path, label }) => h("option", { value: path }, label)));
    this.adder.disabled = inactive.length === 0;
  }

  /** The row of an active LoRA. If there are several, each has a weight, which the strengths multiply. */
  row(one) {
    const id = freshId("weight");
    const weight = h("input", {
      type: "number", id, min: LIMITS.strengths.min, max: LIMITS.strengths.max, step: 0.05, value: one.strength,
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
      }, { icon: "close", kind: "quiet tiny", label: `Remove ${one.label}` }));
  }
}

/** Available LoRAs: those of this run, then the finished ones of other runs. */
async function availableLoras(run, detail) {
  const [checkpoints, runs] = await Promise.all([get("run/checkpoints", { run }), get("runs")]);
  const ofCheckpoints = detail.config?.model_type === "full" ? [] : checkpoints
    .filter(({ state }) => state !== "damaged")
    .map(({ step, path }) => ({ path, label: `this run, step ${step}` }))
    .reverse();
  const finished = runs.filter(({ lora }) => lora).map((other) => ({
    path: `${other.run}/${other.lora}`, label: other.run === run ? "this run, finished" : `${other.name}, finished`, isOwn: other.run === run,
  }));
  return [...finished.filter(({ isOwn }) => isOwn), ...ofCheckpoints, ...finished.filter(({ isOwn }) => !isOwn)];
}
