/** One line with the machine's GPU, RAM and disk use. */

import { ApiFault, get } from "./api.js";
import { h } from "./dom.js";
import { gib } from "./format.js";

const EVERY_MS = 5000;

export class MachineLine {
  constructor() {
    this.node = h("ul", { class: "plain machine small numbers", "aria-label": "Machine" });
    this.update();
    this.timer = setInterval(() => this.update(), EVERY_MS);
  }

  close() {
    clearInterval(this.timer);
  }

  async update() {
    if (document.hidden || this.isAsking) return;
    this.isAsking = true;
    try {
      this.node.replaceChildren(...items(await get("machine")));
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      this.node.replaceChildren(); // the screen reports that the server does not answer
    } finally {
      this.isAsking = false;
    }
  }
}

function items({ gpus, ram_total_bytes: total, ram_available_bytes: available, disk_free_bytes: free, disk_is_low: isLow }) {
  return [
    ...gpus.map((gpu) => item(gpus.length > 1 ? `GPU ${gpu.index}` : "GPU", gpuText(gpu), false, gpu.name)),
    total === null ? null : item("RAM", `${gib(total - available)} of ${gib(total)}`),
    item("Disk", isLow ? `only ${gib(free)} free` : `${gib(free)} free`, isLow),
  ].filter(Boolean);
}

function gpuText({ utilization_percent: busy, used_bytes: used, total_bytes: total }) {
  const memory = total === null ? null : `${gib(used ?? 0)} of ${gib(total)}`;
  return [busy === null ? null : `${busy} %`, memory].filter(Boolean).join(", ") || "use unknown";
}

const item = (name, text, isBad = false, title = null) =>
  h("li", { class: isBad ? "low" : "", title }, h("span", {}, name), ` ${text}`);
