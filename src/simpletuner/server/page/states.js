// The states of a run, in words and as badges.

import { h } from "./dom.js";
import { count } from "./format.js";

/** States of a run; active ones first. */
export const STATES = ["starting", "running", "waiting", "failed", "killed", "stopped", "done"];

/** The color of each state's badge. */
const KINDS = { waiting: "", starting: "accent", running: "accent", done: "good", stopped: "warn", failed: "bad", killed: "bad", cancelled: "warn" };

/** As TITLES of simpletuner.runs.events. */
const PHASES = {
  scan: "scanning the images",
  text: "encoding captions",
  latents: "encoding images",
  load: "loading the transformer",
  train: "training",
  validation: "validating",
  export: "writing the result",
};

/** A phase in words. */
export const phaseText = (phase) => (phase === null ? "starting" : (PHASES[phase] ?? phase));

/** Whether a process works on a run in this state. */
export const isActive = (state) => state === "starting" || state === "running";

/** A state as a badge. */
export const stateBadge = (state) => h("span", { class: `badge ${KINDS[state] ?? ""}` }, state);

/** A progress bar of a run's steps, with text. */
export function stepBar({ name, step, steps }) {
  const text = steps > 0 ? `${count(step)} of ${count(steps)} steps` : "no step yet";
  return h("div", { class: "step-bar" },
    h("progress", { value: step, max: Math.max(steps, 1), "aria-label": `${name}: ${text}` }), h("span", { class: "small numbers dim" }, text));
}
