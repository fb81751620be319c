// The queue: runs that wait for their turn, one at a time for each set of devices.

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

  /** Ask the server. */
  async update() {
    const entries = await get("queue");
    const text = JSON.stringify(entries);
    if (text === this.shown) return;
    this.shown = text;
    const focused = document.activeElement?.dataset?.entry;
    this.node.hidden = entries.length === 0;
    let place = 0;
    const waiting = entries.filter(({ state }) => state === "waiting").length;
    const rows = entries.map((entry) => this.row(entry, entry.state === "waiting" ? (place += 1) : null, waiting));
    this.node.replaceChildren(h("h2", {}, "Queue"), this.halted(entries), h("div", { class: "sheet scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Order", "Run", "Devices", "State", "Added", "What to do"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, rows))));
    if (focused) this.focus(focused);
  }

  /** Back to the button that was pressed, or to the one beside it where that cannot be pressed any more. */
  focus(entry) {
    const [id] = entry.split(" ");
    const again = this.node.querySelector(`[data-entry="${CSS.escape(entry)}"]:not([disabled])`);
    (again ?? this.node.querySelector(`[data-entry^="${CSS.escape(id)} "]:not([disabled])`))?.focus();
  }

  /** What to do where nothing works on what waits: after the machine was off, or a disk was full. */
  halted(entries) {
    const busy = new Set(entries.filter(({ state }) => state === "running").map(({ devices }) => devices));
    if (!entries.some(({ state, devices }) => state === "waiting" && !busy.has(devices))) return "";
    const goOn = button("Go on", async () => {
      await post("queue/resume");
      await this.update();
    }, { icon: "play" });
    return h("div", { class: "panel row" }, h("p", { class: "grow" }, "Runs wait and none is being trained."), goOn);
  }

  row(entry, place, waiting) {
    const { id, output_dir, environment, example, devices, state, added, error } = entry;
    const from = example ? `example ${example}` : environment ? `environment ${environment}` : "";
    return h("tr", {},
      h("td", { class: "numbers" }, place === null ? "" : String(place)),
      h("td", {}, state === "waiting" ? output_dir : h("a", { href: to("run", "", { run: output_dir }) }, output_dir),
        from ? h("p", { class: "small dim" }, from) : null),
      h("td", {}, devices || "all"),
      h("td", {}, stateBadge(state), error ? h("p", { class: "fault" }, error.split("\n")[0]) : null),
      h("td", { class: "numbers" }, when(added)),
      h("td", {}, h("div", { class: "row nowrap" },
        place === null ? null : this.mover(entry, "up", place === 1), place === null ? null : this.mover(entry, "down", place === waiting),
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
    const text = `${output_dir} will not be trained. What it has trained before stays.`;
    if (state === "waiting" && !(await confirm("Remove from the queue?", text, "Remove", "danger"))) return;
    try {
      await del("queue", { id });
    } catch (error) {
      toast(error.message, "bad");
    }
    await this.update();
  }
}
