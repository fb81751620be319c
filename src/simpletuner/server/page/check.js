// Asking the shell's own rules about a draft, a moment after the last change.

import { ApiFault, post } from "./api.js";
import { h } from "./dom.js";
import { some } from "./format.js";

/**
 * Asks once typing has paused; an answer that is overtaken is dropped.
 * @param {number} wait in milliseconds @param {(signal: AbortSignal) => Promise<void>} work
 */
export function pausing(wait, work) {
  let timer = 0;
  let running = null;
  const now = async () => {
    clearTimeout(timer);
    running?.abort();
    const mine = new AbortController();
    running = mine;
    try {
      await work(mine.signal);
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

/** The answer of POST /api/check; a refusal of the request itself comes as its problems. */
export async function checked(draft, signal) {
  try {
    return await post("check", draft, {}, signal);
  } catch (error) {
    if (!(error instanceof ApiFault)) throw error;
    return { problems: error.problems, notices: [], values: {}, origins: {} };
  }
}

/**
 * The list of what is wrong and what to know.
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
          h("h2", {}, `${some(problems.length, "thing")} to mend`),
          h("ul", {}, problems.map((one) => h("li", {},
            h("button", { type: "button", class: "link", onclick: () => jump(one) }, one.found || one.text),
            h("span", { class: "dim" }, one.remedy ? ` ${one.remedy}` : ""))))));
      }
      if (notices.length) {
        node.append(h("details", { class: "panel" },
          h("summary", {}, `${some(notices.length, "notice")}`),
          h("ul", {}, notices.map((notice) => h("li", {}, notice)))));
      }
      node.hidden = node.childElementCount === 0;
    },
  };
}

