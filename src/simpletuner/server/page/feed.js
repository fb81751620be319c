/** The list of runs, asked for once for all who show it: the first screen and the tab's title. */

import { get } from "./api.js";
import { othersInTitle } from "./title.js";

const SHOWN_MS = 3000;
/** Where no list is shown, or the tab is in the background: only the title changes. */
const UNSEEN_MS = 10_000;

/** The first time, once the screen has what it needs. */
export const SOON_MS = 1000;

const listeners = new Set();
let timer;

/** Call `listener` with the runs, or with null and an error, each time they are asked for. Returns what ends it. */
export function followRuns(listener) {
  listeners.add(listener);
  plan();
  return () => listeners.delete(listener);
}

/** Ask now. Throws what the request throws. */
export async function updateRuns() {
  const runs = await get("runs");
  othersInTitle(runs);
  for (const listener of [...listeners]) listener(runs, null);
  return runs;
}

/** Keep asking, for the first time after a while. */
export function plan(pause = document.hidden || listeners.size === 0 ? UNSEEN_MS : SHOWN_MS) {
  clearTimeout(timer);
  timer = setTimeout(async () => {
    try {
      await updateRuns();
    } catch (error) {
      for (const listener of [...listeners]) listener(null, error);
    }
    plan();
  }, pause);
}

document.addEventListener("visibilitychange", () => plan());
