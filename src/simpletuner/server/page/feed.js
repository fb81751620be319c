/** The list of runs, polled once for both the first screen and the tab's title. */

import { get } from "./api.js";
import { showOthersInTitle } from "./title.js";

const SHOWN_MS = 3000;
/** Interval while no list is shown or the tab is in the background: only the title changes. */
const UNSEEN_MS = 10_000;

/** Delay of the first poll, so that the screen loads first. */
export const SOON_MS = 1000;

const listeners = new Set();
let timer;

/** Call `listener` after each poll with the runs, or with null and an error. Returns a function that unsubscribes. */
export function followRuns(listener) {
  listeners.add(listener);
  schedulePoll();
  return () => listeners.delete(listener);
}

/** Poll now. @throws {ApiFault} the request fails */
export async function updateRuns() {
  const runs = await get("runs");
  showOthersInTitle(runs);
  for (const listener of [...listeners]) listener(runs, null);
  return runs;
}

/** Poll after `pause` milliseconds, then repeatedly. */
export function schedulePoll(pause = document.hidden || listeners.size === 0 ? UNSEEN_MS : SHOWN_MS) {
  clearTimeout(timer);
  timer = setTimeout(async () => {
    try {
      await updateRuns();
    } catch (error) {
      for (const listener of [...listeners]) listener(null, error);
    }
    schedulePoll();
  }, pause);
}

document.addEventListener("visibilitychange", () => schedulePoll());
