// The queue. Runs on the same devices start one after another.

import { del, get, post } from "./api.js";
import { button, confirm, h, toast } from "./dom.js";
import { when } from "./format.js";
import { to } from "./router.js";
import { stateBadge } from "./states.js";

export class QueueList {
  constructor() {
    this.shown = "";
    this.node = h("section", { class: "stack queue", "aria-label": "Queue", hidden: true });
  }

  /** Load the queue and show it. */
  async update() {
    const entries = await get("queue");
    const text = JSON.stringify(entries);
    if (text === this.shown) return;
    this.shown = text;
    const focused = document.activeElement?.dataset?.entry;
    this.node.hidden = entries.length === 0;
    let position = 0;
    const waiting = entries.filter(({ state }) => state === "waiting").length;
    const rows = entries.map((entry) => this.row(entry, entry.state === "waiting" ? (position += 1) : null, waiting));
    this.node.replaceChildren(h("h2", {}, "Queue"), this.resumePanel(entries), h("div", { class: "sheet scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Order", "Run", "Devices", "State", "Added", "Actions"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, rows))));
    if (focused) this.focus(focused);
  }

  /** Focus the pressed button again, or the one beside it if it is disabled now. */
  focus(entry) {
    const [id] = entry.split(" ");
    const pressed = this.node.querySelector(`[data-entry="${CSS.escape(entry)}"]:not([disabled])`);
    (pressed ?? this.node.querySelector(`[data-entry^="${CSS.escape(id)} "]:not([disabled])`))?.focus();
  }

  /** The panel that resumes a halted queue, after the machine was off or a disk was full. */
  resumePanel(entries) {
    const busy = new Set(entries.filter(({ state }) => state === "running").map(({ devices }) => devices));
    if (!entries.some(({ state, devices }) => state === "waiting" && !busy.has(devices))) return "";
    const resume = button("Resume the queue", async () => {
      await post("queue/resume");
      await this.update();
    }, { icon: "play" });
    return h("div", { class: "panel row" }, h("p", { class: "grow" }, "Runs are waiting, but none is training."), resume);
  }

  row(entry, position, waiting) {
    const { id, output_dir, environment, example, devices, state, added, error } = entry;
    const origin = example ? `example ${example}` : environment ? `environment ${environment}` : "";
    return h("tr", {},
      h("td", { class: "numbers" }, position === null ? "" : String(position)),
      h("td", {}, state === "waiting" ? output_dir : h("a", { href: to("run", "", { run: output_dir }) }, output_dir),
        origin ? h("p", { class: "small dim" }, origin) : null),
      h("td", {}, devices || "all"),
      h("td", {}, stateBadge(state), error ? h("p", { class: "fault" }, error.split("\n")[0]) : null),
      h("td", { class: "numbers" }, when(added)),
      h("td", {}, h("div", { class: "row nowrap" },
        position === null ? null : this.mover(entry, "up", position === 1), position === null ? null : this.mover(entry, "down", position === waiting),
        state === "running" ? null : button("Remove", () => this.remove(entry), {
          icon: "trash", kind: "quiet tiny", label: `Remove ${output_dir} from the queue`, dataset: { entry: `${id} remove` },
        }))));
  }

  mover({ id, output_dir }, to, isAtEnd) {
    return button("", async () => {
      try {
        await post("queue/move", { id, to });
      } catch (error) {
        toast(error.message, "bad");
      }
      await this.update();
    }, { icon: to, kind: "quiet tiny", label: `Move ${output_dir} ${to}`, disabled: isAtEnd, dataset: { entry: `${id} ${to}` } });
  }

  async remove({ id, output_dir, state }) {
    const text = `${output_dir} will not be trained. Files from earlier training stay.`;
    if (state === "waiting" && !(await confirm("Remove from the queue?", text, "Remove", "danger"))) return;
    try {
      await del("queue", { id });
    } catch (error) {
      toast(error.message, "bad");
    }
    await this.update();
  }
}
