// The states of a run and how they are shown.

import { h } from "./dom.js";
import { count } from "./format.js";

/** Of a run, those that go on first. */
export const STATES = ["starting", "running", "waiting", "failed", "killed", "stopped", "done"];

const KINDS = { waiting: "", starting: "accent", running: "accent", done: "good", stopped: "warn", failed: "bad", killed: "bad", cancelled: "warn" };

const PHASES = {
  scan: "looking through the pictures",
  text: "encoding captions",
  latents: "encoding pictures",
  load: "loading the model",
  train: "training",
  validation: "drawing and measuring",
  export: "writing the result",
};

/** A phase in words. */
export const phaseText = (phase) => (phase === null ? "starting" : (PHASES[phase] ?? phase));

/** Whether a process works on a run in this state. */
export const isGoingOn = (state) => state === "starting" || state === "running";

/** A state as a badge. */
export const stateBadge = (state) => h("span", { class: `badge ${KINDS[state] ?? ""}` }, state);

/** How far a run is, as a bar with its text. */
export function stepBar({ name, step, steps }) {
  const text = steps > 0 ? `${count(step)} of ${count(steps)} steps` : "no step yet";
  return h("div", { class: "step-bar" },
    h("progress", { value: step, max: Math.max(steps, 1), "aria-label": `${name}: ${text}` }), h("span", { class: "small numbers dim" }, text));
}
