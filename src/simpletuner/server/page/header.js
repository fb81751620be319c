/** The head of a run's screen: where it stands, what it takes, what went wrong, and what came of it. */

import { secondsLeft } from "./events.js";
import { fill, h } from "./dom.js";
import { count, duration } from "./format.js";
import { short } from "./numbers.js";
import { downloadLink } from "./checkpoints.js";
import { phaseText, stateBadge } from "./states.js";

export class Header {
  /** @param {import("./events.js").RunStore} store @param {HTMLElement} verbs @param {(tab: string) => void} show */
  constructor(store, verbs, show) {
    this.store = store;
    this.show = show;
    this.badge = h("span");
    this.lost = h("div", { class: "panel warn", role: "status", hidden: true });
    this.outcome = h("div", { class: "stack" });
    this.bar = h("progress", { "aria-label": "Progress of the run" });
    this.said = h("p", { class: "numbers", "aria-live": "off" });
    this.facts = h("dl", { class: "tiles" });
    this.phases = h("ol", { class: "phases", "aria-label": "Phases" });
    this.spoken = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.node = h("div", { class: "stack" },
      h("div", { class: "head" }, h("h1", {}, store.detail.name), this.badge, h("span", { class: "grow" }), verbs),
      this.lost, this.outcome,
      h("section", { class: "sheet stack", "aria-label": "Where it stands" },
        this.bar, h("div", { class: "row standing" }, this.said, this.phases), this.facts, this.spoken));
  }

  update() {
    const { detail, connection } = this.store;
    this.lost.hidden = connection === "open";
    if (connection === "lost") {
      this.lost.textContent = "The page lost the server; the run goes on. It catches up as soon as the server answers: simpletuner server";
    }
    this.badge.replaceChildren(stateBadge(detail.state));
    const text = this.progress(detail);
    this.said.textContent = text;
    this.facts.replaceChildren(...this.tiles(detail));
    this.phases.replaceChildren(...detail.phases.map((one) => phaseItem(one, detail)));
    const spoken = `${detail.state}${detail.state === "running" ? `, ${phaseText(detail.phase)}` : ""}`;
    if (this.spoken.textContent !== spoken) this.spoken.textContent = spoken;
    const outcome = `${detail.state} ${detail.error} ${detail.lora}`;
    if (outcome !== this.shownOutcome) {
      this.shownOutcome = outcome;
      this.outcome.replaceChildren(...this.endings(detail));
    }
  }

  /** Set the bar; return what it says in words. */
  progress(detail) {
    const { step, steps, phase, state } = detail;
    const current = state === "running" ? detail.phases.find((one) => one.phase === phase)?.progress : null;
    if (current && phase !== "train" && phase !== "validation") {
      Object.assign(this.bar, { max: Math.max(1, current.total), value: current.done });
      return `${capital(phaseText(phase))}: ${count(current.done)} of ${count(current.total)}`;
    }
    if (steps === null) {
      if (state === "running") this.bar.removeAttribute("value");
      else this.bar.value = 0;
      return state === "running" ? `${capital(phaseText(phase))} …` : state === "waiting" ? "Nothing has happened yet." : "No step was made.";
    }
    Object.assign(this.bar, { max: Math.max(1, steps), value: step });
    const doing = state === "running" && phase !== "train" ? `, ${phaseText(phase)}${current ? ` ${current.done} of ${current.total}` : ""}` : "";
    return `Step ${count(step)} of ${count(steps)} (${Math.floor((100 * step) / Math.max(1, steps))} %)${doing}`;
  }

  tiles(detail) {
    const { steps, heldOut } = this.store;
    const left = secondsLeft(this.store);
    const tiles = {
      "Time left": left === null ? null : duration(left),
      Loss: steps.length ? short(steps.last("loss")) : null,
      "Held-out loss": heldOut.length ? short(heldOut.last("loss")) : null,
      "Seconds a step": steps.length ? short(steps.recentMedian("seconds", 50)) : null,
      "Peak memory": steps.length ? `${short(steps.last("memory_gib"))} GiB` : null,
      // Between attempts nothing was done.
      Took: detail.ended && detail.attempts === 1 ? duration((Date.parse(detail.ended) - Date.parse(detail.started)) / 1000) : null,
      Attempt: detail.attempts > 1 ? detail.attempts : null,
    };
    return Object.entries(tiles).filter(([, value]) => value !== null)
      .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "numbers" }, String(value))));
  }

  endings({ state, error, lora, run, config }) {
    const link = (text, tab) => h("button", { type: "button", onclick: () => this.show(tab) }, text);
    if (state === "done" && lora) {
      return [h("div", { class: "panel good row" },
        h("p", { class: "grow" }, h("strong", {}, "The LoRA is finished. "), "Every FLUX.2 tool loads it."),
        link("Try it", "try"), downloadLink(run, lora, "Download the LoRA", "primary"))];
    }
    if (state === "done" && config?.model_type === "full") {
      return [h("div", { class: "panel good row" },
        h("p", { class: "grow" }, h("strong", {}, "The model is finished: "), h("code", {}, `${run}/model`)), link("Try it", "try"))];
    }
    if (state === "failed" || error) return [failure(error, link)];
    if (state === "killed") {
      return [h("div", { class: "panel bad row", role: "alert" },
        h("p", { class: "grow" }, h("strong", {}, "The run broke off without a word: "),
          "its process was killed, or the machine went down. “Start again” goes on from the newest whole checkpoint."), link("Log", "log"))];
    }
    if (state === "stopped") return [h("div", { class: "panel warn" }, "The run was stopped and saved. “Resume” goes on from there.")];
    return [];
  }
}

/** The text of a failed run: its first line is what happened, each further one a problem of its own. */
function failure(error, link) {
  const lines = (error ?? "The run failed and did not say why; its log may tell.").split("\n").filter((line) => line.trim() !== "");
  const [first, ...rest] = lines;
  // Found and expected, then the remedy: the first sentence is what happened.
  const end = first.search(/[.:] /) + 1 || first.length;
  const said = h("p", { class: "grow" }, h("strong", {}, first.slice(0, end)), first.slice(end));
  return fill(h("div", { class: "panel bad", role: "alert" }), h("div", { class: "row" }, said, link("Log", "log")),
    rest.length ? h("ul", {}, rest.map((line) => h("li", {}, line.replace(/^\s*-\s*/, "")))) : null);
}

function phaseItem({ phase, state, seconds, progress }, detail) {
  const isOpen = state === "begin";
  const isCurrent = isOpen && detail.state === "running" && detail.phase === phase;
  const broke = isOpen && detail.state !== "running";
  const took = seconds === null || seconds === undefined ? "" : duration(seconds);
  const far = isOpen && progress ? `${count(progress.done)}/${count(progress.total)}` : took;
  return h("li", { class: isCurrent ? "current" : broke ? "broke" : "", "aria-current": isCurrent ? "step" : null },
    h("span", {}, phase), h("span", { class: "small numbers" }, broke ? "broke off" : far));
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
