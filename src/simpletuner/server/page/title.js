/**
 * The tab's title: how far a run is ("42 % · cats"), and how it ended ("done · cats"). The run whose screen is open
 * comes first, then another one that goes on; then one that ended since the screen was opened.
 */

const LIVE = ["starting", "running"];

let screen = "simpletuner";
/** The run whose screen is open. */
let own = null;
/** Another run that went on when it was looked for last, or that ended since the screen was opened. */
let other = null;

const isLive = (run) => run !== null && LIVE.includes(run.state);

function told({ name, state, step, steps }) {
  return `${state === "running" && steps ? `${Math.floor((100 * step) / steps)} %` : state} · ${name}`;
}

function draw() {
  const run = [own, other].find(isLive) ?? own ?? other;
  document.title = run ? told(run) : screen;
}

/** Another screen is shown. */
export function screenTitle(text) {
  screen = text;
  own = null;
  if (!isLive(other)) other = null;
  draw();
}

/** The run of this screen stands so; null where it is gone. */
export function ownInTitle(run) {
  own = run;
  draw();
}

/** The runs of the list stand so. */
export function othersInTitle(runs) {
  const elsewhere = runs.filter(({ run }) => run !== own?.run);
  const known = other && elsewhere.find(({ run }) => run === other.run);
  other = (isLive(known ?? null) ? known : elsewhere.find(isLive)) ?? known ?? null;
  draw();
}
