// Which LoRAs act, and how strongly.

import { get } from "./api.js";
import { button, freshId, h, problemPanel } from "./dom.js";

export class LoraChoice {
  /** @param {string} run */
  constructor(run) {
    this.run = run;
    /** @type {{path: string, label: string, strength: number}[]} */
    this.list = [];
    this.known = [];
    this.rows = h("div", { class: "stack tight" });
    this.adder = h("select", { "aria-label": "Add a LoRA", onchange: () => this.add() });
    this.node = h("fieldset", { class: "loras" }, h("legend", {}, "LoRAs and their strength"), this.rows, this.adder);
  }

  /** Ask what there is; the newest of this run acts at first. */
  async update(detail) {
    try {
      this.known = await knownLoras(this.run, detail);
    } catch (error) {
      this.rows.replaceChildren(problemPanel(error));
      return;
    }
    const [first] = this.known;
    if (this.list.length === 0 && first?.label.startsWith("this run")) this.list = [{ ...first, strength: 1 }];
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
  }

  draw() {
    this.rows.replaceChildren(...this.list.map((one) => this.row(one)));
    if (this.list.length === 0) this.rows.append(h("p", { class: "hint" }, "None: the base model draws, or what the run has finished."));
    const left = this.known.filter(({ path }) => !this.list.some((one) => one.path === path));
    this.adder.replaceChildren(h("option", { value: "" }, left.length ? "Add a LoRA …" : "No other LoRA is there"),
      ...left.map(({ path, label }) => h("option", { value: path }, label)));
    this.adder.disabled = left.length === 0;
  }

  row(one) {
    const id = freshId("strength");
    const said = h("output", { class: "numbers", for: id });
    const range = h("input", {
      type: "range", id, min: 0, max: 2, step: 0.05, value: one.strength,
      oninput: () => {
        one.strength = Number(range.value);
        said.value = one.strength.toFixed(2);
      },
    });
    said.value = one.strength.toFixed(2);
    return h("div", { class: "lora" },
      h("label", { for: id }, one.label), range, said,
      button("", () => {
        this.list.splice(this.list.indexOf(one), 1);
        this.draw();
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
