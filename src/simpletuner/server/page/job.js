// Start, follow and cancel a job of the server.

import { ApiFault, del, get, post } from "./api.js";
import { button, h, problemPanel } from "./dom.js";
import { count } from "./format.js";

const PERIOD = 500;

const wait = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

/**
 * A panel that shows one job at a time.
 * @returns {{node: HTMLElement, run: (kind: string, title: string, body: object, changed?: (job: object) => void) => Promise<any|null>,
 *   close: () => void}} `run` returns the job's result, or null after the panel has shown that it failed or was cancelled. `changed` is
 *   called with the job after each poll.
 */
export function jobPanel() {
  const node = h("div", { class: "stack", "aria-live": "polite", hidden: true });
  let lastJob = 0;

  async function run(kind, title, body, changed = () => {}) {
    const jobNumber = ++lastJob;
    const bar = h("progress", { "aria-label": title });
    const words = h("p", { class: "numbers" }, `${title} …`);
    const lines = h("pre", { class: "lines", tabindex: "0", "aria-label": "Output of the command" });
    const cancel = button("Cancel", () => { cancel.disabled = true; return del(`jobs/${job.id}`); }, { icon: "stop" });
    node.replaceChildren(h("div", { class: "sheet stack" },
      h("div", { class: "row" }, h("div", { class: "grow" }, words), cancel), bar,
      h("details", {}, h("summary", {}, "Output of the command"), lines)));
    node.hidden = false;

    let job;
    try {
      job = await post(`jobs/${kind}`, body);
      while (job.state === "running") {
        await wait(PERIOD);
        if (jobNumber !== lastJob) return null;
        job = await get(`jobs/${job.id}`);
        changed(job);
        const { progress } = job;
        if (progress !== null) {
          const what = progress.what === title.toLowerCase() ? "" : `${progress.what}, `;
          words.textContent = `${title}: ${what}${count(progress.done)} of ${count(progress.total)}`;
          bar.max = Math.max(1, progress.total);
          bar.value = progress.done;
        } else if (job.lines.length) words.textContent = `${title}: ${job.lines.at(-1)}`;
        lines.textContent = job.lines.join("\n");
      }
    } catch (error) {
      if (jobNumber === lastJob) node.replaceChildren(problemPanel(error), closing());
      return null;
    }
    if (jobNumber !== lastJob) return null;
    if (job.state === "done") {
      node.hidden = true;
      return job.result;
    }
    if (job.problems.length === 0 && job.state === "cancelled") node.replaceChildren(h("div", { class: "panel row" }, h("p", { class: "grow" }, `${title}: cancelled. Finished work stays.`), closing()));
    else {
      node.replaceChildren(problemPanel(new ApiFault(422, job.problems)),
        job.lines.length ? h("details", { class: "sheet" }, h("summary", {}, "Output of the command"), h("pre", { class: "lines" }, job.lines.join("\n"))) : "", closing());
    }
    return null;
  }

  const closing = () => h("div", {}, button("Close", () => { node.hidden = true; }, { kind: "tiny" }));

  return { node, run, close() { lastJob += 1; } };
}
