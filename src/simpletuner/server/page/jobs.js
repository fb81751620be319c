// A long command of the server, followed to its end.

import { ApiFault, del, get } from "./api.js";
import { button, h } from "./dom.js";

const POLL_MS = 700;

export class JobView {
  constructor() {
    this.title = h("p", {});
    this.bar = h("progress", { "aria-label": "Progress" });
    this.stop = button("Cancel", () => this.cancel(), { icon: "close", kind: "quiet" });
    this.node = h("div", { class: "sheet stack", role: "status", hidden: true },
      h("div", { class: "row" }, h("div", { class: "grow" }, this.title), this.stop), this.bar);
    this.id = null;
  }

  close() {
    clearTimeout(this.timer);
    this.isClosed = true;
  }

  /** Show a job until it ends; throws its problems where it fails. */
  async follow(job, text) {
    this.id = job.id;
    this.node.hidden = false;
    try {
      while (job.state === "running") {
        const { progress } = job;
        this.title.textContent = progress ? `${text}: ${progress.what} ${progress.done} of ${progress.total}` : `${text} …`;
        if (progress) Object.assign(this.bar, { max: progress.total, value: progress.done });
        else this.bar.removeAttribute("value");
        await new Promise((resolve) => {
          this.timer = setTimeout(resolve, POLL_MS);
        });
        job = await get(`jobs/${job.id}`);
      }
    } finally {
      this.node.hidden = true;
    }
    if (job.state === "failed") throw new ApiFault(422, job.problems.length ? job.problems : [asProblem(job)]);
    return job;
  }

  cancel() {
    return del(`jobs/${this.id}`);
  }
}

function asProblem({ exit_code, lines }) {
  const found = `The command ended with exit code ${exit_code}.`;
  return { found, expected: "", remedy: lines.slice(-5).join(" "), key: "", document: "", text: found };
}
