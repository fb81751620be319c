/**
 * The tab's title: a run's progress ("42 % · cats") or outcome ("done · cats"). The run of the open screen takes
 * precedence, then another live run, then one that ended since the screen was opened.
 */

const LIVE = ["starting", "running"];

let screen = "simpletuner";
/** The run of the open screen. */
let screenRun = null;
/** Another run: live when the list was last read, or ended since the screen was opened. */
let otherRun = null;

const isLive = (run) => run !== null && LIVE.includes(run.state);

function titleOf({ name, state, step, steps }) {
  return `${state === "running" && steps ? `${Math.floor((100 * step) / steps)} %` : state} · ${name}`;
}

function showTitle() {
  const run = [screenRun, otherRun].find(isLive) ?? screenRun ?? otherRun;
  document.title = run ? titleOf(run) : screen;
}

/** Set the title of a newly opened screen. */
export function screenTitle(text) {
  screen = text;
  screenRun = null;
  if (!isLive(otherRun)) otherRun = null;
  showTitle();
}

/** Update the run of the open screen; null if it was deleted. */
export function showRunInTitle(run) {
  screenRun = run;
  showTitle();
}

/** Update the runs of the list. */
export function showOthersInTitle(runs) {
  const otherRuns = runs.filter(({ run }) => run !== screenRun?.run);
  const current = otherRun && otherRuns.find(({ run }) => run === otherRun.run);
  otherRun = (isLive(current ?? null) ? current : otherRuns.find(isLive)) ?? current ?? null;
  showTitle();
}
