/**
 * The store of one run: the server's data, updated by the run's events. If the server does not answer, it retries with
 * growing pauses and catches up from the last id. Ids rise by one; a gap reloads everything.
 */

import { ApiFault, address, get } from "./api.js";
import { Series } from "./series.js";

const PAUSES_MS = [500, 1000, 2000, 4000, 5000];
const GATHER_MS = 80;
const POLL_MS = 3000;
/** While a run is starting: a start that fails early writes no event. */
const POLL_AT_START_MS = 1000;
const GONE = 404;

/** Topics of a change; listeners receive a set of them. */
const TOPICS = ["status", "steps", "heldOut", "drift", "validations", "checkpoints", "notices", "connection"];

/** Topics that the curves show. */
export const CURVES = ["steps", "heldOut", "drift"];

export class RunStore {
  /** @param {string} run its path, as the server names it */
  constructor(run) {
    this.run = run;
    /** The response of `GET /api/run`, updated by events. */
    this.detail = null;
    this.steps = new Series(["loss", "lr", "grad_norm", "seconds", "memory_gib"]);
    this.heldOut = new Series(["loss", "ema_loss"]);
    this.drift = new Series(["drift", "ema_drift"]);
    this.lastId = 0;
    /** "open"; "lost" while the server does not answer; "gone" if the run was deleted. */
    this.connection = "open";
    this.listeners = new Set();
    this.changed = new Set();
    this.failures = 0;
    this.isClosed = false;
    this.lastEventAt = 0;
  }

  /** Load the run and follow it. @throws {ApiFault} the first request fails */
  async open() {
    await this.load();
    this.follow();
    this.watch = setInterval(() => this.poll(), POLL_AT_START_MS);
    this.polledAt = Date.now();
  }

  close() {
    this.isClosed = true;
    this.source?.close();
    clearInterval(this.watch);
    clearTimeout(this.retry);
    clearTimeout(this.gather);
    this.listeners.clear();
  }

  /** Call `listener` with the set of changed topics, shortly after a change. Returns a function that unsubscribes. */
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
    // The two responses may be some events apart; events that only one of them has are read again.
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
    this.source.onerror = () => this.reconnect();
  }

  /** After a lost stream: retry until the server answers, then follow from the last received event. */
  reconnect() {
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
        if (!this.isClosed) this.reconnect();
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

  /** Whether an error says that the run was deleted; if so, stop following it. */
  isGone(error) {
    if (error.status !== GONE) return false;
    this.source?.close();
    clearInterval(this.watch);
    this.connection = "gone";
    this.report("connection");
    return true;
  }

  /** Refresh a quiet run: its state can change without an event, as when its process is killed. */
  async poll() {
    const { state } = this.detail;
    const pause = state === "starting" ? POLL_AT_START_MS : POLL_MS;
    const isQuiet = Date.now() - Math.max(this.lastEventAt, this.polledAt) >= pause - POLL_AT_START_MS / 2;
    if (this.connection !== "open" || !isQuiet || document.hidden || !["starting", "running", "waiting"].includes(state)) return;
    this.polledAt = Date.now();
    try {
      await this.refresh();
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      this.isGone(error);
    }
  }

  /** Load the run's state again. */
  async refresh() {
    const detail = await get("run", { run: this.run });
    if (this.isClosed) return;
    if (detail.last_id < this.lastId) {
      await this.reload(); // the run's folder was replaced
      return;
    }
    if (detail.last_id > this.lastId) {
      for (const key of ["state", "pid", "ended", "error", "saved", "note"]) this.detail[key] = detail[key];
    } else {
      this.detail = detail;
    }
    this.report("status");
  }

  /** Load everything again. */
  async reload() {
    this.source?.close();
    try {
      await this.load();
      this.follow();
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      if (!this.isGone(error)) this.reconnect();
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
    // The loaded detail may be ahead of the series; then the event updates only the series.
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

/** Updates of a store by event type; each returns the changed topics. */
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
    const entry = detail.phases.find((one) => one.phase === phase);
    const update = { phase, state, seconds, memory_gib, progress: state === "begin" ? null : (entry?.progress ?? null) };
    if (entry) Object.assign(entry, update);
    else detail.phases.push(update);
    // Validation is nested in training: when it ends, training continues.
    const open = detail.phases.filter((one) => one.state === "begin");
    detail.phase = state === "begin" ? phase : (open.at(-1)?.phase ?? detail.phase);
    return ["status"];
  },
  progress({ detail }, { phase, done, total, per_s, eta_s }) {
    const entry = detail.phases.find((one) => one.phase === phase);
    if (entry) entry.progress = { done, total, per_s, eta_s };
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
    // A start that ends with an error before training does not count as an attempt.
    const trained = detail.phases.some((one) => one.phase === "train");
    if (reason === "error" && start !== undefined && !trained) detail.attempts = attempt - 1;
    return ["status", "checkpoints"];
  },
};

/** Seconds left: of training, by the median of its last 50 steps; of other phases, their own estimate; null if unknown. */
export function secondsLeft({ detail, steps }) {
  if (detail.state !== "running") return null;
  const current = detail.phases.find((one) => one.phase === detail.phase);
  if (detail.phase !== "train" && detail.phase !== "validation") return current?.progress?.eta_s ?? null;
  const perStep = steps.recentMedian("seconds", 50);
  return Number.isFinite(perStep) ? perStep * Math.max(0, detail.steps - detail.step) : null;
}
