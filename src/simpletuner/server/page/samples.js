// Pictures that were drawn to try a LoRA, newest first; each beside the base's where that was drawn from the same.

import { address, get } from "./api.js";
import { button, dialog, h, icon, problemPanel } from "./dom.js";
import { beforeAfter } from "./slider.js";

const SHOWN_AT_FIRST = 24;

/** What must be the same for two pictures to be compared. */
const keyOf = ({ prompt, seed, width, height, steps, guidance }) => JSON.stringify([prompt, seed, width, height, steps, guidance]);

const isBase = ({ loras }) => loras.every(({ strength }) => strength === 0);

export class Samples {
  /** @param {string} run */
  constructor(run) {
    this.run = run;
    this.limit = SHOWN_AT_FIRST;
    this.list = [];
    this.body = h("div", { class: "sample-grid" });
    this.more = button("Show more", () => {
      this.limit *= 2;
      this.draw();
    }, { kind: "quiet" });
    this.news = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.node = h("section", { class: "sheet stack", "aria-label": "Samples" }, h("h2", {}, "Samples"), this.body, this.more, this.news);
  }

  /** Ask the server what was drawn. */
  async update() {
    try {
      const before = this.list.length;
      this.list = await get("run/samples", { run: this.run });
      if (before > 0 && this.list.length > before) this.news.textContent = "New pictures are there.";
      this.draw();
    } catch (error) {
      this.body.replaceChildren(problemPanel(error));
    }
  }

  draw() {
    const bases = new Map(this.list.filter(isBase).reverse().map((one) => [keyOf(one), one]));
    const tried = this.list.filter((one) => !isBase(one));
    const paired = new Set(tried.map(keyOf));
    const shown = this.list.filter((one) => !isBase(one) || !paired.has(keyOf(one)));
    this.more.hidden = shown.length <= this.limit;
    this.body.replaceChildren(...shown.slice(0, this.limit).map((one) => sample(one, isBase(one) ? null : bases.get(keyOf(one)))));
    if (shown.length === 0) {
      this.body.replaceChildren(h("p", { class: "dim" },
        "None yet. Write what the picture should show and press Draw; the pictures stay in the folder “samples” of the run."));
    }
  }
}

/** One picture with what it was drawn from, and the base's beside it where there is one. */
function sample(one, base) {
  const { path, prompt, seed, width, height, steps, guidance, loras } = one;
  const url = address("picture", { path });
  const name = path.split("/").at(-1);
  const acting = loras.map((lora) => `${lora.name.replace(/^pytorch_lora_weights\.safetensors$/, "LoRA")} at ${lora.strength}`).join(", ") || "the base model";
  const about = [seed !== null && `seed ${seed}`, `${width} × ${height}`, steps && `${steps} steps`, guidance !== null && `guidance ${guidance}`, acting];
  const image = (src, alt, caption) => h("div", {},
    h("img", { src, alt, width, height, loading: "lazy" }), base ? h("p", { class: "small dim" }, caption) : null);
  const compare = () => dialog({
    title: prompt ?? name,
    wide: true,
    actions: [{ label: "Close", value: null }],
    body: h("div", { class: "viewer" },
      beforeAfter({ src: address("picture", { path: base.path }), label: "base" }, { src: url, label: "with the LoRA" }, one)),
  });
  return h("figure", { class: base ? "sample paired" : "sample" },
    h("div", { class: "row nowrap pair-of" },
      base ? image(address("picture", { path: base.path }), `Base: ${prompt ?? name}`, "Base") : null,
      image(url, prompt ?? name, "With the LoRA")),
    h("figcaption", { class: "stack tight" },
      h("p", {}, prompt ?? name),
      h("p", { class: "small dim numbers" }, about.filter(Boolean).join(" · ")),
      h("div", { class: "row" },
        base ? button("Compare", compare, { icon: "eye", kind: "quiet tiny" }) : null,
        h("a", { class: "button quiet tiny", href: url, download: name }, icon("download"), "Download"))));
}
