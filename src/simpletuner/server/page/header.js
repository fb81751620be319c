/** The head of a run's screen: status, progress, resources, errors and result. */

import { secondsLeft } from "./events.js";
import { button, fill, h } from "./dom.js";
import { count, duration, engineText } from "./format.js";
import { short } from "./numbers.js";
import { downloadLink } from "./checkpoints.js";
import { MachineLine } from "./meter.js";
import { editNote } from "./note.js";
import { isActive, phaseText, stateBadge } from "./states.js";
import { showRunInTitle } from "./title.js";

/** The flavour whose LoRAs other tools do not load. */
const EMBEDDED = "tiny";

export class Header {
  /** @param {import("./events.js").RunStore} store @param {HTMLElement} verbs @param {(tab: string) => void} show */
  constructor(store, verbs, show) {
    this.store = store;
    this.show = show;
    this.verbs = verbs;
    this.badge = h("span");
    this.lost = h("div", { class: "panel warn", role: "status", hidden: true });
    this.outcome = h("div", { class: "stack" });
    this.bar = h("progress", { "aria-label": "Progress of the run" });
    this.progressText = h("p", { class: "numbers", "aria-live": "off" });
    this.facts = h("dl", { class: "tiles" });
    this.phases = h("ol", { class: "phases", "aria-label": "Phases" });
    this.note = h("p", { class: "run-note grow" });
    this.noteButton = button("Note", async () => {
      if (await editNote(store.detail)) await store.refresh();
    }, { icon: "edit", kind: "quiet tiny", label: "Note on this run" });
    this.machine = new MachineLine();
    this.spoken = h("p", { class: "visually-hidden", "aria-live": "polite" });
    this.node = h("div", { class: "stack" },
      h("div", { class: "head" }, h("h1", {}, store.detail.name), this.badge, h("span", { class: "grow" }), this.noteButton, verbs),
      h("div", { class: "row" }, this.note, this.machine.node),
      this.lost, this.outcome,
      h("section", { class: "sheet stack", "aria-label": "Status" },
        this.bar, h("div", { class: "row standing" }, this.progressText, this.phases), this.facts, this.spoken));
  }

  close() {
    this.machine.close();
  }

  update() {
    const { detail, connection } = this.store;
    this.lost.hidden = connection === "open";
    if (connection === "lost") {
      const runText = isActive(detail.state) ? "; the run continues" : "";
      this.lost.textContent = `The connection to the server is lost${runText}. The page catches up once the server answers. If the server has ended, start it with: simpletuner server`;
    }
    if (connection === "gone") {
      this.lost.replaceChildren(...goneText(this.store.run));
      this.verbs.hidden = this.noteButton.hidden = true;
    }
    showRunInTitle(connection === "gone" ? null : detail);
    this.note.textContent = detail.note;
    this.badge.replaceChildren(stateBadge(detail.state));
    const text = this.progress(detail);
    this.progressText.textContent = text;
    this.facts.replaceChildren(...this.tiles(detail));
    this.phases.replaceChildren(...detail.phases.map((one) => phaseItem(one, detail)));
    const spoken = `${detail.state}${detail.state === "running" ? `, ${phaseText(detail.phase)}` : ""}`;
    if (this.spoken.textContent !== spoken) this.spoken.textContent = spoken;
    const outcome = `${detail.state} ${detail.error} ${detail.lora} ${detail.saved}`;
    if (outcome !== this.shownOutcome) {
      this.shownOutcome = outcome;
      this.outcome.replaceChildren(...this.outcomePanels(detail));
    }
  }

  /** Update the progress bar and return its text. */
  progress(detail) {
    const { step, steps, phase, state } = detail;
    const current = state === "running" ? detail.phases.find((one) => one.phase === phase)?.progress : null;
    if (current && phase !== "train" && phase !== "validation") {
      Object.assign(this.bar, { max: Math.max(1, current.total), value: current.done });
      return `${capital(phaseText(phase))}: ${count(current.done)} of ${count(current.total)}`;
    }
    if (steps === null) {
      if (isActive(state)) this.bar.removeAttribute("value");
      else this.bar.value = 0;
      return isActive(state) ? `${capital(phaseText(phase))} …` : state === "waiting" ? "The run has not started yet." : "No step was finished.";
    }
    Object.assign(this.bar, { max: Math.max(1, steps), value: step });
    const activity = state === "running" && phase !== "train" ? `, ${phaseText(phase)}${current ? ` ${current.done} of ${current.total}` : ""}` : "";
    return `Step ${count(step)} of ${count(steps)} (${Math.floor((100 * step) / Math.max(1, steps))} %)${activity}`;
  }

  tiles(detail) {
    const { steps, heldOut } = this.store;
    const remaining = secondsLeft(this.store);
    const tiles = {
      "Time left": remaining === null ? null : duration(remaining),
      "Loss of the last step": steps.length ? short(steps.last("loss")) : null,
      "Held-out loss": heldOut.length ? short(heldOut.last("loss")) : null,
      "Seconds per step": steps.length ? short(steps.recentMedian("seconds", 50)) : null,
      Engine: engineText(detail.plan),
      "Peak memory": steps.length ? `${short(steps.last("memory_gib"))} GiB` : null,
      // Only for a single attempt: with several, the time between them would be included.
      Took: detail.ended && detail.attempts === 1 ? duration((Date.parse(detail.ended) - Date.parse(detail.started)) / 1000) : null,
      Attempt: detail.attempts > 1 ? detail.attempts : null,
    };
    return Object.entries(tiles).filter(([, value]) => value !== null)
      .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "numbers" }, String(value))));
  }

  outcomePanels(detail) {
    const link = (text, tab) => h("button", { type: "button", onclick: () => this.show(tab) }, text);
    const panels = this.endPanels(detail, link);
    const hasFailedStart = detail.error && ["done", "stopped", "killed"].includes(detail.state);
    return hasFailedStart ? [failure(`The last start failed. ${detail.error}`, link), ...panels] : panels;
  }

  endPanels({ state, error, lora, run, config, step, saved }, link) {
    if (state === "done" && lora) {
      return [h("div", { class: "panel good row" },
        h("p", { class: "grow" }, h("strong", {}, "The LoRA is finished. "),
          config?.model_flavour === EMBEDDED ? "It works with the small built-in FLUX.2 only." : "Every FLUX.2 tool loads it."),
        link("Try it", "try"), downloadLink(run, lora, "Download the LoRA", "primary"))];
    }
    if (state === "done" && config?.model_type === "full") {
      return [h("div", { class: "panel good row" },
        h("p", { class: "grow" }, h("strong", {}, "The model is finished: "), h("code", {}, `${run}/model`)), link("Try it", "try"))];
    }
    if (state === "failed") return [failure(error, link)];
    if (state === "killed") {
      return [h("div", { class: "panel bad row", role: "alert" },
        h("p", { class: "grow" }, h("strong", {}, "The run ended without a message: "),
          "its process was killed, or the machine went down. “Start again” resumes from the newest undamaged checkpoint."), link("Log", "log"))];
    }
    return state === "stopped" ? [h("div", { class: "panel warn" }, stoppedText(step, saved))] : [];
  }
}

/** The text for a stopped run; it says "saved at" only if the last step was saved. */
function stoppedText(step, saved) {
  if (saved === null) return step > 0 ? `The run was stopped after step ${count(step)}, and no checkpoint was saved: “Resume” starts from the beginning.`
    : "The run was stopped before its first step: there was nothing to save. “Resume” starts its training.";
  if (saved < step) return `The run was stopped after step ${count(step)}, which was not saved. “Resume” continues from the checkpoint at step ${count(saved)}.`;
  return `The run was stopped and saved at step ${count(saved)}. “Resume” continues from there.`;
}

/** The text shown for a deleted run. */
export const goneText = (run) => [
  h("p", {}, h("strong", {}, "This run no longer exists. "), "Its folder, ", h("code", {}, run), ", was deleted or moved. ", h("a", { href: "#/" }, "Back to the runs")),
];

/** A panel with the error of a failed run: its first line says what happened, each further line is one problem. */
function failure(error, link) {
  const lines = (error ?? "The run failed without an error message; see its log.").split("\n").filter((line) => line.trim() !== "");
  const [first, ...problems] = lines;
  // Emphasize the first sentence, which says what happened.
  const end = first.search(/[.:] /) + 1 || first.length;
  const message = h("p", { class: "grow" }, h("strong", {}, first.slice(0, end)), first.slice(end));
  return fill(h("div", { class: "panel bad", role: "alert" }), h("div", { class: "row" }, message, link("Log", "log")),
    problems.length ? h("ul", {}, problems.map((line) => h("li", {}, line.replace(/^\s*-\s*/, "")))) : null);
}

function phaseItem({ phase, state, seconds, progress }, detail) {
  const isOpen = state === "begin";
  const isCurrent = isOpen && detail.state === "running" && detail.phase === phase;
  const isInterrupted = isOpen && detail.state !== "running";
  const timeText = seconds === null || seconds === undefined ? "" : duration(seconds);
  const progressText = isOpen && progress ? `${count(progress.done)}/${count(progress.total)}` : timeText;
  return h("li", { class: isCurrent ? "current" : isInterrupted ? "broke" : "", "aria-current": isCurrent ? "step" : null },
    h("span", {}, phase), h("span", { class: "small numbers" }, isInterrupted ? "interrupted" : progressText));
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
