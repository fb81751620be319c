// Pictures that were drawn to try something, newest first. What they were drawn from is remembered in this browser.

import { address } from "./api.js";
import { button, dialog, h, icon } from "./dom.js";
import { beforeAfter } from "./slider.js";

const KEPT = 40;

export class Samples {
  /** @param {string} run */
  constructor(run) {
    this.key = `simpletuner.samples.${run}`;
    this.list = remembered(this.key);
    this.node = h("section", { class: "stack", "aria-label": "Samples", "aria-live": "polite" });
    this.draw();
  }

  /** Pictures came: of each prompt `count`, and the base's in the same order or none. */
  add(asked, pictures, base) {
    this.list.unshift({ asked, pictures, base });
    this.list.length = Math.min(this.list.length, KEPT);
    localStorage.setItem(this.key, JSON.stringify(this.list));
    this.draw();
  }

  draw() {
    if (this.list.length === 0) {
      this.node.replaceChildren(h("div", { class: "sheet empty" }, h("h3", {}, "No samples yet"), h("p", {}, "Write what the picture should show and press Draw. The pictures stay on the disk, in the folder that each of them names.")));
      return;
    }
    this.node.replaceChildren(
      h("div", { class: "head" }, h("h2", {}, "Samples"), button("Clear the list", () => {
        this.list = [];
        localStorage.removeItem(this.key);
        this.draw();
      }, { kind: "quiet", icon: "close", title: "The files stay" })),
      ...this.list.map((one) => this.group(one)),
    );
  }

  group({ asked, pictures, base }) {
    const loras = asked.loras.map(({ path, strength }) => `${path.split("/").slice(-2).join("/")} at ${strength}`).join(", ") || "no LoRA named";
    const about = [`seed ${asked.seed}`, `${asked.width} × ${asked.height}`, asked.steps && `${asked.steps} steps`,
      asked.guidance !== null && `guidance ${asked.guidance}`, loras].filter(Boolean).join(" · ");
    return h("article", { class: "sheet stack" },
      h("p", { class: "small dim" }, about),
      h("div", { class: "sample-grid" }, pictures.map((path, index) => this.sample(asked, path, base[index], index))));
  }

  sample(asked, path, base, index) {
    const prompt = asked.prompts[Math.floor(index / asked.count)];
    const url = address("picture", { path });
    const name = path.split("/").at(-1);
    const shown = (src, alt) => h("img", { src, alt, width: asked.width, height: asked.height, loading: "lazy" });
    return h("figure", { class: "sample" },
      h("div", { class: "row nowrap pair-of" },
        base ? h("div", {}, shown(address("picture", { path: base }), `Base: ${prompt}`), h("p", { class: "small dim" }, "Base")) : null,
        h("div", {}, shown(url, prompt), base ? h("p", { class: "small dim" }, "With the LoRA") : null)),
      h("figcaption", { class: "stack tight" }, h("p", {}, prompt), h("p", { class: "small dim numbers" }, `seed ${asked.seed + (index % asked.count)} · ${path}`),
        h("div", { class: "row" },
          h("a", { class: "button quiet tiny", href: url, download: name }, icon("download"), "Download"),
          base ? button("Compare", () => dialog({
            title: prompt, wide: true, actions: [{ label: "Close", value: null }],
            body: h("div", { class: "viewer" }, beforeAfter({ src: address("picture", { path: base }), label: "base" }, { src: url, label: "with the LoRA" }, asked)),
          }), { icon: "eye", kind: "quiet tiny" }) : null)));
  }
}

function remembered(key) {
  const text = localStorage.getItem(key);
  return text === null ? [] : JSON.parse(text);
}
