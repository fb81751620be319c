/**
 * The store of one run: what the server knows of it, brought up to date by its events. It survives a server that is
 * away: it asks again with growing pauses and catches up from the last id. Ids rise by one; a gap loads all anew.
 */

import { ApiFault, address, get } from "./api.js";
import { Series } from "./series.js";

const PAUSES_MS = [500, 1000, 2000, 4000, 5000];
const GATHER_MS = 80;
const LOOK_AGAIN_MS = 3000;
/** While a run is starting: a start that is refused writes no event. */
const LOOK_AT_START_MS = 1000;
const GONE = 404;

/** What may change; listeners are given a set of these. */
const TOPICS = ["status", "steps", "heldOut", "drift", "validations", "checkpoints", "notices", "connection"];

/** Those of them that the curves show. */
export const CURVES = ["steps", "heldOut", "drift"];

export class RunStore {
  /** @param {string} run its path, as the server names it */
  constructor(run) {
    this.run = run;
    /** The answer of `GET /api/run`, kept up to date. */
    this.detail = null;
    this.steps = new Series(["loss", "lr", "grad_norm", "seconds", "memory_gib"]);
    this.heldOut = new Series(["loss", "ema_loss"]);
    this.drift = new Series(["drift", "ema_drift"]);
    this.lastId = 0;
    /** "open", "lost" while the server does not answer, or "gone" where the run is not there any more. */
    this.connection = "open";
    this.listeners = new Set();
    this.changed = new Set();
    this.failures = 0;
    this.isClosed = false;
    this.lastEventAt = 0;
  }

  /** Load the run and follow it. Throws what the first request throws. */
  async open() {
    await this.load();
    this.follow();
    this.watch = setInterval(() => this.lookAgain(), LOOK_AT_START_MS);
    this.lookedAt = Date.now();
  }

  close() {
    this.isClosed = true;
    this.source?.close();
    clearInterval(this.watch);
    clearTimeout(this.retry);
    clearTimeout(this.gather);
    this.listeners.clear();
  }

  /** Call `listener` with the set of topics that changed, soon after they did. Returns what ends it. */
  subscribe(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  async load() {
    const [detail, series] = await Promise.all([get("run", { run: this.run }), get("run/series", { run: this.run })]);
    this.detail = detail;
    this.steps.fill(series);
    this.heldOut.fill(series.held_out);
    this.drift.fill(series.drift);
    // The two answers may be some events apart: those that only one of them has come again.
    this.lastId = Math.min(detail.last_id, series.last_id);
    this.report(...TOPICS);
  }

  follow() {
    if (this.isClosed) return;
    this.source?.close();
    this.source = new EventSource(address("run/events", { run: this.run, after: this.lastId }));
    this.source.onopen = () => {
      this.failures = 0;
      this.connected(true);
    };
    this.source.onmessage = (message) => this.take(Number(message.lastEventId), message.data);
    this.source.addEventListener("reset", () => this.reload());
    this.source.onerror = () => this.again();
  }

  /** The stream broke: ask until the server answers, then go on after the last event that came. */
  again() {
    this.source.close();
    clearTimeout(this.retry);
    const pause = PAUSES_MS[Math.min(this.failures, PAUSES_MS.length - 1)];
    this.failures += 1;
    this.retry = setTimeout(async () => {
      try {
        await this.refresh();
        this.follow();
      } catch (error) {
        if (!(error instanceof ApiFault)) throw error;
        if (this.isGone(error)) return;
        this.connected(error.status !== 0);
        if (!this.isClosed) this.again();
      }
    }, pause);
    if (this.failures > 1) this.connected(false);
  }

  connected(isOpen) {
    const state = isOpen ? "open" : "lost";
    if (state === this.connection) return;
    this.connection = state;
    this.report("connection");
  }

  /** Whether an error says that the run was deleted; then all that follows it ends. */
  isGone(error) {
    if (error.status !== GONE) return false;
    this.source?.close();
    clearInterval(this.watch);
    this.connection = "gone";
    this.report("connection");
    return true;
  }

  /** The state of a run can change without an event: a process that is killed writes none. */
  async lookAgain() {
    const { state } = this.detail;
    const pause = state === "starting" ? LOOK_AT_START_MS : LOOK_AGAIN_MS;
    const isQuiet = Date.now() - Math.max(this.lastEventAt, this.lookedAt) >= pause - LOOK_AT_START_MS / 2;
    if (this.connection !== "open" || !isQuiet || document.hidden || !["starting", "running", "waiting"].includes(state)) return;
    this.lookedAt = Date.now();
    try {
      await this.refresh();
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      this.isGone(error);
    }
  }

  /** Ask for the run's state anew. */
  async refresh() {
    const detail = await get("run", { run: this.run });
    if (this.isClosed) return;
    if (detail.last_id < this.lastId) {
      await this.reload(); // the folder was made anew
      return;
    }
    if (detail.last_id > this.lastId) {
      for (const key of ["state", "pid", "ended", "error", "saved", "note"]) this.detail[key] = detail[key];
    } else {
      this.detail = detail;
    }
    this.report("status");
  }

  /** Forget what is known and load it anew. */
  async reload() {
    this.source?.close();
    try {
      await this.load();
      this.follow();
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      if (!this.isGone(error)) this.again();
    }
  }

  take(id, text) {
    if (id <= this.lastId) return;
    if (id !== this.lastId + 1) {
      this.reload();
      return;
    }
    this.lastId = id;
    this.lastEventAt = Date.now();
    const event = JSON.parse(text);
    const starts = event.start ?? event.attempt;
    if (starts > this.detail.starts) {
      Object.assign(this.detail, { starts, attempts: event.attempt, phases: [], phase: null, state: "running", ended: null, error: null });
    }
    // Loading may have brought the detail further than the series: then only the series takes it.
    const apply = (id <= this.detail.last_id ? APPLY_TO_SERIES : APPLY)[event.type];
    if (apply) this.report(...apply(this, event));
  }

  report(...topics) {
    for (const topic of topics) this.changed.add(topic);
    this.gather ??= setTimeout(() => {
      this.gather = undefined;
      const { changed } = this;
      this.changed = new Set();
      for (const listener of [...this.listeners]) listener(changed);
    }, GATHER_MS);
  }
}

const APPLY_TO_SERIES = {
  step({ steps }, event) {
    steps.put(event);
    return ["steps"];
  },
  validation({ heldOut, drift }, event) {
    const isMeasured = { heldOut: event.loss !== null, drift: (event.drift ?? null) !== null };
    if (isMeasured.heldOut) heldOut.put(event);
    if (isMeasured.drift) drift.put(event);
    return Object.keys(isMeasured).filter((topic) => isMeasured[topic]);
  },
};

/** What each type of event does to a store; returns the topics that change. */
const APPLY = {
  run({ detail }, { pid, steps }) {
    Object.assign(detail, { pid, steps });
    return ["status"];
  },
  plan({ detail }, { plan }) {
    detail.plan = plan;
    return ["status"];
  },
  phase({ detail }, { phase, state, seconds, memory_gib }) {
    const known = detail.phases.find((one) => one.phase === phase);
    const now = { phase, state, seconds, memory_gib, progress: state === "begin" ? null : (known?.progress ?? null) };
    if (known) Object.assign(known, now);
    else detail.phases.push(now);
    // A validation lies within training: when it ends, training goes on.
    const open = detail.phases.filter((one) => one.state === "begin");
    detail.phase = state === "begin" ? phase : (open.at(-1)?.phase ?? detail.phase);
    return ["status"];
  },
  progress({ detail }, { phase, done, total, per_s, eta_s }) {
    const known = detail.phases.find((one) => one.phase === phase);
    if (known) known.progress = { done, total, per_s, eta_s };
    return ["status"];
  },
  step(store, event) {
    Object.assign(store.detail, { step: event.step, loss: event.loss });
    return ["status", ...APPLY_TO_SERIES.step(store, event)];
  },
  validation(store, event) {
    store.detail.validations.push(event);
    return ["validations", ...APPLY_TO_SERIES.validation(store, event)];
  },
  checkpoint({ detail }, event) {
    detail.checkpoints.push(event);
    if (event.state === "saved") detail.saved = event.step;
    return ["checkpoints"];
  },
  notice({ detail }, { text }) {
    detail.notices.push(text);
    return ["notices"];
  },
  error({ detail }, { text }) {
    detail.error = text;
    return ["status"];
  },
  end({ detail }, { reason, lora, time, attempt, start }) {
    Object.assign(detail, { state: reason === "error" ? "failed" : reason, ended: time, lora });
    // A start that ends with an error before it trains is no attempt.
    const trained = detail.phases.some((one) => one.phase === "train");
    if (reason === "error" && start !== undefined && !trained) detail.attempts = attempt - 1;
    return ["status", "checkpoints"];
  },
};

/** Seconds left of the training, from the middle of its last steps; null while that cannot be said. */
export function secondsLeft({ detail, steps }) {
  if (detail.state !== "running") return null;
  const current = detail.phases.find((one) => one.phase === detail.phase);
  if (detail.phase !== "train" && detail.phase !== "validation") return current?.progress?.eta_s ?? null;
  const each = steps.recentMedian("seconds", 50);
  return Number.isFinite(each) ? each * Math.max(0, detail.steps - detail.step) : null;
}
