/** The checkpoints of a run: list, verify, resume from, download and delete them. */

import { address, del, get, post } from "./api.js";
import { button, confirmTyped, h, icon, problemPanel, toast } from "./dom.js";
import { count, size, when } from "./format.js";
import { formatDownload } from "./loraformats.js";
import { showReport } from "./report.js";

const LORA = "pytorch_lora_weights.safetensors";

const STATES = { unverified: ["", "not verified"], good: ["good", "undamaged"], damaged: ["bad", "damaged"] };

/** A checkpoint's folder, relative to its run. */
const checkpointFolder = (step) => `checkpoints/step-${String(step).padStart(6, "0")}`;

/** A link that downloads a file of a run. */
export const downloadLink = (run, path, text, kind = "") =>
  h("a", { class: `button ${kind}`, href: address("run/file", { run, path }), download: true }, icon("download"), text);

export class Checkpoints {
  /**
   * @param {string} run
   * @param {() => object} detail
   * @param {(options: object) => Promise<void>} start starts the run with options
   */
  constructor(run, detail, start) {
    this.run = run;
    this.detail = detail;
    this.start = start;
    this.body = h("div", { class: "stack" });
    this.node = h("section", { class: "sheet stack", "aria-label": "Checkpoints" }, h("h2", {}, "Checkpoints"), this.body);
  }

  /** Load the list of checkpoints. */
  async update() {
    try {
      this.list = (await get("run/checkpoints", { run: this.run })).reverse();
    } catch (error) {
      this.body.replaceChildren(problemPanel(error));
      return;
    }
    this.draw();
  }

  draw() {
    const { lora, state, config } = this.detail();
    const finished = lora ? h("div", { class: "row" }, h("p", { class: "grow" }, "The finished LoRA: ", h("code", {}, lora)),
      config?.use_ema ? downloadLink(this.run, `ema/${LORA}`, "Download the moving average") : null,
      button("Inspect", () => showReport(`${this.run}/${lora}`), { icon: "search" }),
      formatDownload(`${this.run}/${lora}`, config?.lora_format ?? "diffusers"),
      downloadLink(this.run, lora, "Download the LoRA", "primary")) : null;
    const table = this.list.length > 0
      ? h("div", { class: "scroll checkpoints", tabindex: 0, role: "region", "aria-label": "List of checkpoints" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Step", "Size", "Written", "State", "Actions"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, this.list.map((one) => this.row(one, state, config)))))
      : h("p", { class: "dim" }, "No checkpoints. The run saves one every checkpoint_step_interval steps, when it is stopped, and on “Save now”.");
    const focused = document.activeElement?.dataset?.does;
    this.body.replaceChildren(...[finished, table].filter(Boolean));
    if (focused) this.body.querySelector(`[data-does="${CSS.escape(focused)}"]`)?.focus();
  }

  row(one, runState, config) {
    const [kind, word] = STATES[one.state];
    const act = (text, iconName, action, onPress, buttonKind = "quiet") => button(text, onPress, {
      icon: iconName, kind: `tiny ${buttonKind}`, label: `${text}: checkpoint at step ${one.step}`, dataset: { does: `${action} ${one.step}` },
    });
    const isLora = config?.model_type !== "full";
    return h("tr", {},
      h("th", { scope: "row", class: "number" }, count(one.step)),
      h("td", { class: "numbers" }, size(one.bytes)),
      h("td", {}, when(one.time)),
      h("td", {}, h("span", { class: `badge ${kind}` }, word), one.damage ? h("p", { class: "fault" }, one.damage) : null),
      h("td", {}, h("div", { class: "row" },
        act("Verify", "check", "verify", () => this.verify(one)),
        runState === "running" || one.state === "damaged" ? null
          : act("Resume from here", "play", "resume", () => this.start({ resume_from_checkpoint: one.path })),
        isLora ? downloadLink(this.run, `${checkpointFolder(one.step)}/${LORA}`, "LoRA", "quiet tiny") : null,
        act("Delete", "trash", "delete", () => this.remove(one), "danger"))));
  }

  async verify(one) {
    try {
      const answer = await post("run/checkpoint/verify", { run: this.run, step: one.step });
      toast(answer.damage ? `Step ${one.step}: ${answer.damage}.` : `The checkpoint at step ${one.step} is undamaged.`, answer.damage ? "bad" : "good");
      Object.assign(this.list.find(({ step }) => step === one.step), { state: answer.state, damage: answer.damage });
      this.draw();
    } catch (error) {
      toast(error.message, "bad");
    }
  }

  async remove({ step, bytes }) {
    if (!(await confirmTyped(`Delete the checkpoint at step ${step}?`, `This frees ${size(bytes)} and cannot be undone.`, String(step)))) return;
    try {
      await del("run/checkpoint", { run: this.run, step, confirm: step });
      toast(`The checkpoint at step ${step} was deleted.`, "good");
    } catch (error) {
      toast(error.message, "bad");
    }
    await this.update();
  }
}
