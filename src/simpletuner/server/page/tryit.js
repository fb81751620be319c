/** Try a LoRA: prompts in, pictures out, with as many LoRAs as wanted and the base beside them. */

import { button, freshId, h, icon, problemPanel } from "./dom.js";
import { jobPanel } from "./job.js";
import { LoraChoice } from "./loras.js";
import { Samples } from "./samples.js";

const SIDE_STEP = 16;
const LONGEST_SIDE = 2048;

export class TryIt {
  /** @param {string} run @param {() => object} detail */
  constructor(run, detail) {
    this.run = run;
    this.detail = detail;
    this.loras = new LoraChoice(run);
    this.samples = new Samples(run);
    this.job = jobPanel();
    this.faults = h("div", { class: "stack" });
    this.node = h("section", { class: "tryit", "aria-label": "Try it" });
    this.isBuilt = false;
  }

  close() {
    this.job.close();
  }

  /** Shown: build the form once, and ask anew which LoRAs there are. */
  async show() {
    if (!this.isBuilt) {
      this.isBuilt = true;
      this.node.replaceChildren(this.form(), h("div", { class: "stack grow" }, this.job.node, this.faults, this.samples.node));
    }
    await Promise.all([this.loras.update(this.detail()), this.samples.update()]);
  }

  form() {
    const { config, validations } = this.detail();
    const drawn = validations.flatMap(({ pictures }) => pictures)[0];
    const [width, height] = drawn ? [drawn.width, drawn.height] : [1024, 1024];
    const field = (label, input, hint = null) => {
      const id = freshId("try");
      input.id = id;
      if (hint) input.setAttribute("aria-describedby", `${id}-hint`);
      return h("div", { class: "stack tight" }, h("label", { for: id }, label), input, hint ? h("p", { class: "hint", id: `${id}-hint` }, hint) : null);
    };
    const number = (value, more) => h("input", { type: "number", value: value ?? "", ...more });
    this.prompts = h("textarea", { rows: 3, required: true, value: drawn?.prompt ?? "" });
    this.seed = number(config?.seed ?? 42, { min: 0, max: 2 ** 32 - 1, step: 1 });
    this.width = number(width, { min: SIDE_STEP, max: LONGEST_SIDE, step: SIDE_STEP });
    this.height = number(height, { min: SIDE_STEP, max: LONGEST_SIDE, step: SIDE_STEP });
    this.steps = number(config?.validation_num_inference_steps, { min: 1, max: 500, step: 1, placeholder: "what suits the model" });
    this.guidance = number(config?.validation_guidance, { min: 0, max: 50, step: 0.1, placeholder: "what suits the model" });
    this.count = number(1, { min: 1, max: 16, step: 1 });
    this.withBase = h("input", { type: "checkbox", checked: true });
    const dice = button("", () => {
      this.seed.value = Math.floor(Math.random() * 2 ** 31);
    }, { icon: "refresh", label: "Another seed" });
    const seedId = freshId("seed");
    this.seed.id = seedId;
    this.draw = h("button", { type: "submit", class: "primary" }, icon("picture"), h("span", {}, "Draw"));
    return h("form", {
      class: "sheet stack",
      onsubmit: (event) => {
        event.preventDefault();
        this.start();
      },
    },
    h("h2", {}, "Try it"),
    field("Prompts", this.prompts, "One a line."),
    this.loras.node,
    h("label", { class: "tick" }, this.withBase, "Draw the base beside it, all strengths at 0"),
    h("div", { class: "fields" },
      h("div", { class: "stack tight" }, h("label", { for: seedId }, "Seed"), h("div", { class: "row nowrap" }, this.seed, dice)),
      field("Pictures of each prompt", this.count), field("Width", this.width), field("Height", this.height),
      field("Sampler steps", this.steps), field("Guidance", this.guidance)),
    h("div", { class: "row" }, this.draw));
  }

  async start() {
    const prompts = this.prompts.value.split("\n").map((text) => text.trim()).filter(Boolean);
    const optional = (input) => (input.value === "" ? null : Number(input.value));
    const asked = {
      run: this.run,
      prompts,
      seed: Number(this.seed.value),
      width: Number(this.width.value),
      height: Number(this.height.value),
      steps: optional(this.steps),
      guidance: optional(this.guidance),
      count: Number(this.count.value),
      loras: this.loras.chosen(),
    };
    this.faults.replaceChildren();
    this.draw.disabled = true;
    try {
      if (!(await this.drawOnce(asked, "the pictures"))) return;
      await this.samples.update();
      const { loras } = asked;
      if (this.withBase.checked && loras.some(({ strength }) => strength !== 0)) {
        await this.drawOnce({ ...asked, loras: loras.map((one) => ({ ...one, strength: 0 })) }, "the base");
        await this.samples.update();
      }
    } catch (error) {
      this.faults.replaceChildren(problemPanel(error));
    } finally {
      this.draw.disabled = false;
    }
  }

  /** Draw once; whether it came to its end. What went wrong is shown. */
  async drawOnce(asked, what) {
    return (await this.job.run("sample", `Drawing ${what}`, asked)) !== null;
  }
}
