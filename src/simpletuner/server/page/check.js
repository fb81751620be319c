// Check a draft by the CLI's rules, shortly after the last change.

import { ApiFault, post } from "./api.js";
import { h } from "./dom.js";
import { plural } from "./format.js";

/**
 * Debounce: run `work` once typing has paused; a newer call aborts the running one.
 * @param {number} wait in milliseconds @param {(signal: AbortSignal) => Promise<void>} work
 */
export function pausing(wait, work) {
  let timer = 0;
  let running = null;
  const now = async () => {
    clearTimeout(timer);
    running?.abort();
    const current = new AbortController();
    running = current;
    try {
      await work(current.signal);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  };
  return {
    now,
    later() {
      clearTimeout(timer);
      timer = setTimeout(now, wait);
    },
    stop() {
      clearTimeout(timer);
      running?.abort();
    },
  };
}

/** The response of POST /api/check; if the request itself is refused, the reasons are returned as problems. */
export async function checked(draft, signal) {
  try {
    return await post("check", draft, {}, signal);
  } catch (error) {
    if (!(error instanceof ApiFault)) throw error;
    return { problems: error.problems, notices: [], values: {}, origins: {} };
  }
}

/**
 * The list of problems and notices.
 * @param {(problem: import("./api.js").Problem) => void} jump
 */
export function summary(jump) {
  const node = h("div", { class: "stack", "aria-live": "polite" });
  return {
    node,
    show({ problems, notices }) {
      node.replaceChildren();
      if (problems.length) {
        node.append(h("div", { class: "panel bad" },
          h("h2", {}, `${plural(problems.length, "problem")} to fix`),
          h("ul", {}, problems.map((one) => h("li", {},
            h("button", { type: "button", class: "link", onclick: () => jump(one) }, one.found || one.text),
            h("span", { class: "dim" }, one.remedy ? ` ${one.remedy}` : ""))))));
      }
      if (notices.length) {
        node.append(h("details", { class: "panel" },
          h("summary", {}, `${plural(notices.length, "notice")}`),
          h("ul", {}, notices.map((notice) => h("li", {}, notice)))));
      }
      node.hidden = node.childElementCount === 0;
    },
  };
}

