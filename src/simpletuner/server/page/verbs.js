// The actions on a run: each button does what one CLI command does.

import { get, post } from "./api.js";
import { ask, button, h, toast } from "./dom.js";
import { deleteRun } from "./note.js";
import { go, to } from "./router.js";
import { isActive } from "./states.js";

const ASK_AGAIN_MS = 1500;

/** The bundled example, and its run directory. */
export const EXAMPLE = "tiny-lora";
const EXAMPLE_RUN = `output/${EXAMPLE}`;

/** The request body of `POST /api/run/start` that starts this run again; null if the page cannot tell. */
async function originOf({ run, environment }) {
  if (environment !== null) return { environment, example: null, options: {} };
  if (run === EXAMPLE_RUN) return { environment: null, example: EXAMPLE, options: {} };
  const queued = (await get("queue")).findLast(({ output_dir }) => output_dir === run);
  if (!queued || (queued.environment === null && queued.example === null)) return null;
  return { environment: queued.environment, example: queued.example, options: optionsOf(queued.arguments) };
}

/** The options `--name=value` among a command's arguments, without those that select its configuration. */
function optionsOf(words) {
  const pairs = words.map((word) => /^--([a-z0-9_]+)=(.*)$/s.exec(word)).filter((match) => match !== null);
  return Object.fromEntries(pairs.map(([, name, value]) => [name, value]).filter(([name]) => !["env", "config", "example"].includes(name)));
}

/** Start a run and show it. @param {{environment?: string|null, example?: string|null, options?: object}} request */
export async function startAndShow({ environment = null, example = null, options = {} }) {
  const { run } = await post("run/start", { environment, example, options });
  go(to("run", "", { run }));
}

/** The buttons for the run's current state. */
export class Verbs {
  /** @param {() => object} detail @param {() => Promise<void>} refresh loads the run's state again */
  constructor(detail, refresh) {
    this.detail = detail;
    this.refresh = refresh;
    this.shown = "";
    this.node = h("div", { class: "row verbs" });
  }

  update() {
    const { state, phase } = this.detail();
    const key = `${state} ${phase === "train" || phase === "validation"}`;
    if (key === this.shown) return;
    this.shown = key;
    this.node.replaceChildren(...(isActive(state) ? this.ofRunning() : this.ofEnded(state)));
  }

  ofRunning() {
    const { phase } = this.detail();
    const isTraining = phase === "train" || phase === "validation";
    return [
      isTraining ? this.requestButton("Validate now", "eye", "validate", "After this step, the run generates validation images and measures the held-out loss.") : null,
      isTraining ? this.requestButton("Save now", "save", "save", "The run writes a checkpoint after this step.") : null,
      this.requestButton("Stop", "stop", "stop", isTraining ? "The run saves a checkpoint after this step and ends. It can be resumed."
        : "The run ends now. It has not trained a step since it was started; prepared caches are kept.", "danger"),
    ].filter(Boolean);
  }

  ofEnded(state) {
    if (state === "waiting") return [this.deleteButton()];
    const resume = button(state === "failed" || state === "killed" ? "Start again" : "Resume", () => this.start(), {
      icon: "play", kind: "primary", title: "Resumes from the newest undamaged checkpoint",
    });
    return [this.deleteButton(), state === "done" ? button("Train for longer", () => this.longer(), { icon: "play" }) : resume];
  }

  deleteButton() {
    return button("Delete", async () => {
      if (await deleteRun(this.detail())) go("#/");
    }, { icon: "trash", kind: "quiet" });
  }

  /** A button that sends the run a request, which it handles after its current step. */
  requestButton(text, icon, verb, message, kind = "") {
    const node = button(text, async () => {
      node.disabled = true;
      try {
        await post(`run/${verb}`, { run: this.detail().run });
        toast(message);
      } catch (error) {
        toast(error.message, "bad");
        node.disabled = false;
        return;
      }
      if (verb === "stop") node.lastChild.textContent = "Stopping …";
      else setTimeout(() => { node.disabled = false; }, ASK_AGAIN_MS);
    }, { icon, kind, title: message });
    return node;
  }

  /** Start the run again with these options; problems are shown as toasts. */
  async start(options = {}) {
    for (const node of this.node.querySelectorAll("button")) node.disabled = true;
    try {
      const origin = await originOf(this.detail());
      if (origin === null) {
        toast("No environment has this folder as its output_dir. To resume, run its command again in a terminal.", "bad");
      } else {
        await post("run/start", { ...origin, options: { ...origin.options, ...options } });
        toast("The run is starting.", "good");
        await this.refresh();
      }
    } catch (error) {
      toast(error.message, "bad");
    }
    this.shown = "";
    this.update();
  }

  async longer() {
    const { steps } = this.detail();
    const answer = await ask("Train for longer", {
      label: "Total steps", value: String(steps * 2), yes: "Train", note: `The run has finished ${steps} steps.`,
      check: (text) => (/^\d+$/.test(text) && Number(text) > steps ? "" : `An integer above ${steps}.`),
    });
    if (answer !== null) await this.start({ max_train_steps: Number(answer) });
  }
}
