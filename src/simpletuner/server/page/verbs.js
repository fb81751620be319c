// What can be done with a run: each button is one command of the shell.

import { get, post } from "./api.js";
import { ask, button, h, toast } from "./dom.js";
import { deleteRun } from "./note.js";
import { go, to } from "./router.js";
import { isGoingOn } from "./states.js";

const ASK_AGAIN_MS = 1500;

/** The example that comes with the program, and where it trains. */
export const EXAMPLE = "tiny-lora";
const EXAMPLE_RUN = `output/${EXAMPLE}`;

/** What a run was started from, as `POST /api/run/start` takes it; null where the page cannot know. */
async function originOf({ run, environment }) {
  if (environment !== null) return { environment, example: null, options: {} };
  if (run === EXAMPLE_RUN) return { environment: null, example: EXAMPLE, options: {} };
  const queued = (await get("queue")).findLast(({ output_dir }) => output_dir === run);
  if (!queued || (queued.environment === null && queued.example === null)) return null;
  return { environment: queued.environment, example: queued.example, options: optionsOf(queued.arguments) };
}

/** `--name=value` of a command, without what selects its configuration. */
function optionsOf(words) {
  const pairs = words.map((word) => /^--([a-z0-9_]+)=(.*)$/s.exec(word)).filter((found) => found !== null);
  return Object.fromEntries(pairs.map(([, name, value]) => [name, value]).filter(([name]) => !["env", "config", "example"].includes(name)));
}

/** Start a run and show it. @param {{environment?: string|null, example?: string|null, options?: object}} what */
export async function startAndShow({ environment = null, example = null, options = {} }) {
  const { run } = await post("run/start", { environment, example, options });
  go(to("run", "", { run }));
}

/** The buttons that make sense in the run's state. */
export class Verbs {
  /** @param {() => object} detail @param {() => Promise<void>} refresh asks for the run's state anew */
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
    this.node.replaceChildren(...(isGoingOn(state) ? this.ofRunning() : this.ofEnded(state)));
  }

  ofRunning() {
    const { phase } = this.detail();
    const isTraining = phase === "train" || phase === "validation";
    return [
      isTraining ? this.asking("Validate now", "eye", "validate", "Pictures and the held-out loss come after this step.") : null,
      isTraining ? this.asking("Save now", "save", "save", "A checkpoint is written after this step.") : null,
      this.asking("Stop", "stop", "stop", isTraining ? "The run saves a checkpoint after this step and ends. It can be resumed."
        : "The run ends where it is. No step has been made since it was started; what is prepared is kept.", "danger"),
    ].filter(Boolean);
  }

  ofEnded(state) {
    if (state === "waiting") return [this.deleting()];
    const resume = button(state === "failed" || state === "killed" ? "Start again" : "Resume", () => this.start(), {
      icon: "play", kind: "primary", title: "Goes on from the newest checkpoint that is whole",
    });
    return [this.deleting(), state === "done" ? button("Train for longer", () => this.longer(), { icon: "play" }) : resume];
  }

  deleting() {
    return button("Delete", async () => {
      if (await deleteRun(this.detail())) go("#/");
    }, { icon: "trash", kind: "quiet" });
  }

  /** A button for a request that the run obeys after its current step. */
  asking(text, icon, verb, said, kind = "") {
    const node = button(text, async () => {
      node.disabled = true;
      try {
        await post(`run/${verb}`, { run: this.detail().run });
        toast(said);
      } catch (error) {
        toast(error.message, "bad");
        node.disabled = false;
        return;
      }
      if (verb === "stop") node.lastChild.textContent = "Stopping …";
      else setTimeout(() => { node.disabled = false; }, ASK_AGAIN_MS);
    }, { icon, kind, title: said });
    return node;
  }

  /** Start it again with other options; what is wrong is said in a toast. */
  async start(options = {}) {
    for (const node of this.node.querySelectorAll("button")) node.disabled = true;
    try {
      const origin = await originOf(this.detail());
      if (origin === null) {
        toast("No environment has this folder as its output_dir: give its command again in the shell to go on.", "bad");
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
      label: "Steps in all", value: String(steps * 2), yes: "Train", note: `The run has finished ${steps} steps.`,
      check: (text) => (/^\d+$/.test(text) && Number(text) > steps ? "" : `A whole number above ${steps}.`),
    });
    if (answer !== null) await this.start({ max_train_steps: Number(answer) });
  }
}
