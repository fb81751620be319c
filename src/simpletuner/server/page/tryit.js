/** Try a LoRA: generate a grid of images for prompts, with a row per seed and a column per strength, beside the base. */

import { button, freshId, h, icon, problemPanel } from "./dom.js";
import { jobPanel } from "./job.js";
import { LIMITS } from "./limits.js";
import { LoraChoice } from "./loras.js";
import { fileName, referenceList } from "./references.js";
import { Samples, gridTable, gridsOf } from "./samples.js";

const STORAGE_PREFIX = "simpletuner.tryit.";

export class TryIt {
  /** @param {string} run @param {() => object} detail */
  constructor(run, detail) {
    this.run = run;
    this.detail = detail;
    this.loras = new LoraChoice(run, () => this.changed());
    this.baseLabel = () => (detail().config?.model_type === "full" ? "The run's model" : "Base");
    this.samples = new Samples(run, this.baseLabel);
    this.job = jobPanel();
    this.faults = h("div", { class: "stack" });
    this.latest = h("section", { class: "sheet stack", "aria-label": "Latest images", hidden: true });
    this.news = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.node = h("section", { class: "tryit", "aria-label": "Try it" });
    this.isBuilt = false;
  }

  close() {
    this.job.close();
  }

  /** Build the form once, and load the available LoRAs and images again. */
  async show() {
    if (!this.isBuilt) {
      this.isBuilt = true;
      this.node.replaceChildren(this.form(),
        h("div", { class: "stack grow" }, this.job.node, this.faults, this.latest, this.samples.node, this.news));
    }
    await Promise.all([this.loras.update(this.detail(), this.settings.loras), this.samples.update()]);
    this.fields.strengths.disabled = this.loras.list.length === 0;
  }

  /** A LoRA was added or removed; without any, strengths have no effect. */
  changed() {
    this.fields.strengths.disabled = this.loras.list.length === 0;
    this.store();
  }

  form() {
    const { config, validations } = this.detail();
    const validationImage = validations.flatMap(({ pictures }) => pictures)[0];
    this.settings = storedSettings(this.run);
    const field = (label, input, hint = null) => {
      const id = freshId("try");
      input.id = id;
      if (hint) input.setAttribute("aria-describedby", `${id}-hint`);
      return h("div", { class: "stack tight" }, h("label", { for: id }, label), input, hint ? h("p", { class: "hint", id: `${id}-hint` }, hint) : null);
    };
    const number = (name, value, attributes) => h("input", { type: "number", value: this.settings[name] ?? value ?? "", ...attributes });
    this.fields = {
      prompts: h("textarea", { rows: 3, required: true, value: this.settings.prompts ?? validationImage?.prompt ?? "" }),
      strengths: h("input", { value: this.settings.strengths ?? "0, 0.5, 1", inputmode: "text", autocomplete: "off", spellcheck: "false" }),
      seed: number("seed", config?.seed ?? 42, { ...LIMITS.seed, step: 1 }),
      count: number("count", 1, { ...LIMITS.count, step: 1 }),
      width: number("width", validationImage?.width ?? 1024, LIMITS.width),
      height: number("height", validationImage?.height ?? 1024, LIMITS.height),
      steps: number("steps", config?.validation_num_inference_steps, { ...LIMITS.steps, step: 1, placeholder: "the model's" }),
      guidance: number("guidance", config?.validation_guidance, { ...LIMITS.guidance, step: 0.1, placeholder: "the model's" }),
    };
    const { prompts, strengths, seed, count, width, height, steps, guidance } = this.fields;
    this.references = referenceList(() => this.store());
    this.references.show(this.settings.references ?? []);
    const randomSeed = button("", () => {
      seed.value = Math.floor(Math.random() * 2 ** 31);
      this.store();
    }, { icon: "refresh", label: "Another seed" });
    seed.id = freshId("seed");
    this.generateButton = h("button", { type: "submit", class: "primary" }, icon("picture"), h("span", {}, "Generate"));
    strengths.addEventListener("input", () => strengths.setCustomValidity(""));
    return h("form", {
      class: "sheet stack",
      oninput: () => this.store(),
      onkeydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.target.form?.requestSubmit();
      },
      onsubmit: (event) => {
        event.preventDefault();
        this.start();
      },
    },
    h("h2", {}, "Try it"),
    field("Prompts", prompts, "One per line. Ctrl+Enter generates."),
    h("div", { class: "stack tight" }, h("span", { class: "label" }, "References"), this.references.node,
      h("p", { class: "hint" }, "Images that every prompt edits or refers to, in this order.")),
    this.loras.node,
    field("Strengths", strengths, "One column of images for each, such as 0, 0.5, 0.8, 1, 1.2. 0 is the base model."),
    h("div", { class: "fields" },
      h("div", { class: "stack tight" }, h("label", { for: seed.id }, "Seed"), h("div", { class: "row nowrap" }, seed, randomSeed)),
      field("Seed count", count), field("Width", width), field("Height", height),
      field("Sampler steps", steps), field("Guidance", guidance)),
    h("div", { class: "row" }, this.generateButton));
  }

  /** Store the settings for the next visit. */
  store() {
    const values = Object.fromEntries(Object.entries(this.fields).map(([name, input]) => [name, input.value]));
    this.settings = { ...values, loras: this.loras.list, references: this.references.paths };
    localStorage.setItem(STORAGE_PREFIX + this.run, JSON.stringify(this.settings));
  }

  /** The numbers in the field; null, with a message at the field, if they are invalid. */
  strengths() {
    const { strengths } = this.fields;
    const words = strengths.value.split(/[\s,;]+/).filter(Boolean);
    const numbers = [...new Set(words.map(Number))];
    const { min, max, items } = LIMITS.strengths;
    const isValid = numbers.length > 0 && numbers.length <= items && numbers.every((one) => one >= min && one <= max);
    strengths.setCustomValidity(isValid ? "" : `Enter 1 to ${items} numbers from ${min} to ${max}, separated by commas: 0, 0.5, 1.`);
    return isValid ? numbers : (strengths.reportValidity(), null);
  }

  async start() {
    const { prompts, seed, count, width, height, steps, guidance } = this.fields;
    const strengths = this.loras.list.length ? this.strengths() : [0];
    if (strengths === null || this.generateButton.disabled) return;
    const optional = (input) => (input.value === "" ? null : Number(input.value));
    const loras = this.loras.chosen();
    const request = {
      run: this.run,
      prompts: [...new Set(prompts.value.split("\n").map((text) => text.trim()).filter(Boolean))],
      seed: Number(seed.value), count: Number(count.value), width: Number(width.value), height: Number(height.value),
      steps: optional(steps), guidance: optional(guidance),
      loras, strengths,
      ...(this.references.paths.length ? { references: this.references.paths } : {}),
    };
    this.faults.replaceChildren();
    this.generateButton.disabled = true;
    let shownCount = -1;
    try {
      await this.job.run("sample", "Generating", request, ({ result }) => {
        const paths = result?.pictures ?? [];
        if (paths.length === shownCount) return;
        shownCount = paths.length;
        if (shownCount) this.news.textContent = `${shownCount} of ${planned(request, this.loras.list).length} images are finished.`;
        this.showLatest(request, paths);
      });
      await this.samples.update();
    } catch (error) {
      this.faults.replaceChildren(problemPanel(error));
    } finally {
      this.generateButton.disabled = false;
    }
  }

  /** Show the images of the last request, with placeholders for unfinished ones. */
  showLatest(request, paths) {
    const pictures = planned(request, this.loras.list).map((one, index) => ({ ...one, path: paths[index] }));
    this.samples.except = new Set(paths);
    this.samples.draw();
    this.latest.hidden = false;
    this.latest.replaceChildren(h("h2", {}, "Latest"), ...gridsOf(pictures, this.baseLabel()).map(gridTable));
  }
}

/** The images of a request in the order they are generated. */
function planned({ prompts, seed: firstSeed, count, strengths, loras, references = [], ...shared }, labels) {
  const seeds = Array.from({ length: count }, (_, index) => firstSeed + index);
  const name = (path) => labels.find((one) => one.path === path)?.label ?? path;
  return prompts.flatMap((prompt) => seeds.flatMap((seed) => strengths.map((strength) => ({
    ...shared, prompt, references: references.map((path) => ({ name: fileName(path) })), seed, loras: loras.map((lora) => ({ name: name(lora.path), strength: round(lora.strength * strength) })),
  }))));
}

const round = (number) => Number(number.toFixed(4));

/** The settings of the last visit. */
function storedSettings(run) {
  try {
    return JSON.parse(localStorage.getItem(STORAGE_PREFIX + run)) ?? {};
  } catch {
    return {};
  }
}
