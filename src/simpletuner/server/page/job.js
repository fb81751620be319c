// A long command of the server: started, followed and cancelled.

import { ApiFault, del, get, post } from "./api.js";
import { button, h, problemPanel } from "./dom.js";
import { count } from "./format.js";

const PERIOD = 500;

const wait = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

/**
 * A place where one job at a time is shown.
 * @returns {{node: HTMLElement, run: (kind: string, title: string, body: object, changed?: (job: object) => void) => Promise<any|null>,
 *   close: () => void}} `run` gives the job's result, or null where it failed or was cancelled, which is shown. `changed` is called with
 *   the job whenever it was asked for.
 */
export function jobPanel() {
  const node = h("div", { class: "stack", "aria-live": "polite", hidden: true });
  let turn = 0;

  async function run(kind, title, body, changed = () => {}) {
    const mine = ++turn;
    const bar = h("progress", { "aria-label": title });
    const words = h("p", { class: "numbers" }, `${title} …`);
    const lines = h("pre", { class: "lines", tabindex: "0", "aria-label": "What the command says" });
    const cancel = button("Cancel", () => { cancel.disabled = true; return del(`jobs/${job.id}`); }, { icon: "stop" });
    node.replaceChildren(h("div", { class: "sheet stack" },
      h("div", { class: "row" }, h("div", { class: "grow" }, words), cancel), bar,
      h("details", {}, h("summary", {}, "What the command says"), lines)));
    node.hidden = false;

    let job;
    try {
      job = await post(`jobs/${kind}`, body);
      while (job.state === "running") {
        await wait(PERIOD);
        if (mine !== turn) return null;
        job = await get(`jobs/${job.id}`);
        changed(job);
        const { progress } = job;
        if (progress !== null) {
          words.textContent = `${title}: ${progress.what}, ${count(progress.done)} of ${count(progress.total)}`;
          bar.max = Math.max(1, progress.total);
          bar.value = progress.done;
        } else if (job.lines.length) words.textContent = `${title}: ${job.lines.at(-1)}`;
        lines.textContent = job.lines.join("\n");
      }
    } catch (error) {
      if (mine === turn) node.replaceChildren(problemPanel(error), closing());
      return null;
    }
    if (mine !== turn) return null;
    if (job.state === "done") {
      node.hidden = true;
      return job.result;
    }
    if (job.problems.length === 0 && job.state === "cancelled") node.replaceChildren(h("div", { class: "panel row" }, h("p", { class: "grow" }, `${title}: cancelled. What was done stays.`), closing()));
    else {
      node.replaceChildren(problemPanel(new ApiFault(422, job.problems)),
        job.lines.length ? h("details", { class: "sheet" }, h("summary", {}, "What the command says"), h("pre", { class: "lines" }, job.lines.join("\n"))) : "", closing());
    }
    return null;
  }

  const closing = () => h("div", {}, button("Close", () => { node.hidden = true; }, { kind: "tiny" }));

  return { node, run, close() { turn += 1; } };
}
