/** A run's notices and its live log. */

import { get } from "./api.js";
import { h } from "./dom.js";
import { plural } from "./format.js";

const POLL_MS = 2000;
const KEPT_CHARACTERS = 400_000;

export class Log {
  /** @param {string} run @param {() => object} detail */
  constructor(run, detail) {
    this.run = run;
    this.detail = detail;
    this.size = 0;
    this.notices = h("div", { class: "stack" });
    this.text = h("pre", { class: "log", tabindex: 0, role: "region", "aria-label": "Log of the run" });
    this.console = h("pre", { class: "log", tabindex: 0, role: "region", "aria-label": "Output of the command" });
    this.consoleBox = h("details", { hidden: true }, h("summary", {}, "Output of the command"), this.console);
    this.state = h("p", { class: "dim" });
    this.node = h("section", { class: "stack", "aria-label": "Log" },
      this.notices, h("div", { class: "sheet stack" }, h("h2", {}, "Log"), this.state, this.text, this.consoleBox));
    this.isShown = false;
    this.timer = setInterval(() => this.poll(), POLL_MS);
  }

  close() {
    clearInterval(this.timer);
  }

  /** Called when the log is shown or hidden; a hidden log is not polled. */
  show(isShown) {
    this.isShown = isShown;
    if (isShown) {
      this.update();
      this.poll(true);
    }
  }

  /** Update the notices. */
  update() {
    const { notices, damaged_lines: damaged } = this.detail();
    const texts = [...new Set(notices)];
    if (damaged > 0) texts.push(`${plural(damaged, "line")} of events.jsonl could not be read; the others are shown.`);
    this.notices.replaceChildren(...(texts.length === 0 ? [] : [
      h("div", { class: "panel warn" }, h("h2", {}, "Notices"), h("ul", {}, texts.map((text) => h("li", {}, text)))),
    ]));
  }

  async poll(isFirst = false) {
    const isOver = !["running", "waiting"].includes(this.detail().state);
    if (!this.isShown || document.hidden || this.isAsking || (isOver && this.isComplete && !isFirst)) return;
    this.isAsking = true;
    try {
      const answer = await get("run/log", { run: this.run, after: this.size });
      if (answer.size < this.size) this.text.textContent = "";
      this.add(answer.text);
      this.size = answer.size;
      this.consoleBox.hidden = !answer.console;
      if (answer.console && answer.console !== this.console.textContent) this.console.textContent = answer.console;
      this.state.textContent = this.text.textContent === "" ? "The log is empty." : "";
      this.isComplete = isOver;
    } catch (error) {
      this.state.textContent = `The log cannot be read now: ${error.message}`;
    } finally {
      this.isAsking = false;
    }
  }

  add(text) {
    if (text === "") return;
    const isAtEnd = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 30;
    const all = this.text.textContent + text;
    this.text.textContent = all.length > KEPT_CHARACTERS ? all.slice(all.indexOf("\n", all.length - KEPT_CHARACTERS) + 1) : all;
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
  }
}
