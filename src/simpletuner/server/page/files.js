/** The screen that inspects a weight file and merges LoRAs. */

import { ApiFault, get, downloadCreated, upload } from "./api.js";
import { button, freshId, h, problemPanel } from "./dom.js";
import { size } from "./format.js";
import { formatChoice } from "./loraformats.js";
import { reportView } from "./report.js";
import { droppable } from "./uploads.js";

/** @param {HTMLElement} root */
export async function files(root) {
  const inspector = new Inspector();
  const merger = new Merger();
  await merger.update();
  root.replaceChildren(h("h1", {}, "Files"), inspector.node, merger.node);
  return () => inspector.close();
}

/** Inspects a dropped or chosen file. The server deletes it afterwards. */
class Inspector {
  constructor() {
    this.stopping = new AbortController();
    const input = h("input", { type: "file", hidden: true, accept: ".safetensors,.gguf", "aria-label": "File to inspect", onchange: () => {
      this.take(input.files[0]);
      input.value = "";
    } });
    this.result = h("div", { class: "stack", "aria-live": "polite" });
    const dropArea = h("div", { class: "drop row" }, button("Choose a file", () => input.click(), { icon: "file", kind: "primary" }), input,
      h("span", { class: "hint" }, "or drop a .safetensors or .gguf file here"));
    this.node = h("section", { class: "sheet stack", "aria-label": "Inspect a file" }, h("h2", {}, "Inspect a file"),
      h("p", {}, "A LoRA from any program, or a part of a model: its layout, rank and target, how it was trained, and which programs load it. ",
        "The file is read and then deleted from the server."),
      dropArea, this.result);
    droppable(dropArea, ({ incoming }) => this.take(incoming[0]?.file));
  }

  close() {
    this.stopping.abort();
  }

  async take(file) {
    if (!file) return;
    this.close();
    const stopping = this.stopping = new AbortController();
    const bar = h("progress", { max: 1, value: 0, "aria-label": "Upload" });
    const words = h("p", { class: "grow" }, `${file.name}, ${size(file.size)} …`);
    this.result.replaceChildren(h("div", { class: "row" }, words, button("Cancel", () => stopping.abort(), { icon: "stop", kind: "tiny" })), bar);
    try {
      const { suffixes, largest } = await get("inspect/rules", {}, stopping.signal);
      const wrong = !suffixes.some((suffix) => file.name.toLowerCase().endsWith(suffix)) ? `${file.name} is refused: its name must end in ${suffixes.join(" or ")}.`
        : file.size > largest ? `${file.name} is larger than ${size(largest)}: inspect it in a terminal with simpletuner inspect.` : "";
      if (wrong) {
        this.result.replaceChildren(h("p", { class: "fault", role: "alert" }, wrong));
        return;
      }
      const inspection = await upload("PUT", "inspect", { name: file.name }, file, (share) => {
        bar.value = share;
        if (share === 1) {
          words.textContent = `${file.name}: reading …`;
          bar.removeAttribute("value");
        }
      }, stopping.signal);
      this.result.replaceChildren(reportView(inspection));
    } catch (error) {
      if (error.name === "AbortError") {
        if (stopping === this.stopping) this.result.replaceChildren();
        return;
      }
      if (!(error instanceof ApiFault)) throw error;
      this.result.replaceChildren(problemPanel(error));
    }
  }
}

/** Merges the finished LoRAs of runs, each with a strength, into one file. */
class Merger {
  constructor() {
    this.rows = [];
    this.body = h("div", { class: "stack" });
    this.result = h("div", { class: "stack", "aria-live": "polite" });
    this.node = h("section", { class: "sheet stack", "aria-label": "Merge LoRAs" }, h("h2", {}, "Merge LoRAs"),
      h("p", {}, "Merges several LoRAs, each at its strength, into one file. Before you merge them, try them together under “Try it” of a run."), this.body);
  }

  async update() {
    const finished = (await get("runs")).filter(({ lora }) => lora).map(({ run, name, lora }) => ({ path: `${run}/${lora}`, name }));
    if (finished.length < 2) {
      this.body.replaceChildren(h("p", { class: "dim" }, "Merging needs two finished LoRAs of runs on this page. In a terminal, simpletuner merge accepts any files."));
      return;
    }
    const list = h("div", { class: "stack tight" });
    const add = (index) => {
      list.append(this.row(finished, index));
      this.review();
    };
    const rank = h("input", { type: "number", id: freshId("rank"), min: 1, max: 4096, step: 1, placeholder: "automatic", "aria-describedby": "rank-hint" });
    const format = formatChoice("Format of the merged LoRA");
    this.press = button("Merge and download", () => this.merge(rank, format.value), { icon: "download", kind: "primary" });
    this.body.replaceChildren(list, h("div", {}, button("Add another", () => add(0), { icon: "plus", kind: "tiny" })),
      h("div", { class: "row merge-tools" }, h("label", { for: rank.id }, "Rank"), rank, format, this.press),
      h("p", { class: "hint", id: "rank-hint" }, "By default the smallest rank that keeps 99 % of the LoRAs' effect."), this.result);
    add(0);
    add(1);
  }

  row(finished, index) {
    const id = freshId("merge");
    const choice = h("select", { "aria-label": "LoRA" }, finished.map(({ path, name }, at) => h("option", { value: path, selected: at === index }, name)));
    const strength = h("input", { type: "number", id, min: -10, max: 10, step: 0.05, value: 1, required: true });
    const entry = { choice, strength };
    const node = h("div", { class: "row nowrap lora" }, choice, h("label", { class: "small", for: id }, "Strength"), strength,
      button("", () => {
        this.rows.splice(this.rows.indexOf(entry), 1);
        node.remove();
        this.review();
      }, { icon: "close", kind: "quiet tiny", label: "Remove this LoRA" }));
    this.rows.push(entry);
    return node;
  }

  review() {
    this.press.disabled = this.rows.length < 2;
  }

  async merge(rank, format) {
    const fields = [...this.rows.map(({ strength }) => strength), rank];
    if (!fields.every((field) => field.reportValidity())) return;
    this.result.replaceChildren();
    try {
      const loras = this.rows.map(({ choice, strength }) => ({ path: choice.value, strength: Number(strength.value) }));
      const lines = await downloadCreated("lora/merge", { loras, format, rank: rank.value === "" ? null : Number(rank.value) });
      this.result.replaceChildren(...lines.map((line) => h("p", {}, line)));
    } catch (error) {
      this.result.replaceChildren(problemPanel(error));
    }
  }
}
