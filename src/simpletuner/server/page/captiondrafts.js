// Captions as they are typed: kept in this browser until the server has confirmed them, and sent again until then.

import { ApiFault, get, put } from "./api.js";

const PREFIX = "simpletuner caption";
const PAUSE = 1000;
const RETRY = 3000;

/**
 * A caption that is not confirmed yet. `revision`: of the text that was edited; `theirs`: what somebody else wrote
 * meanwhile; `fault`: why it is not saved.
 * @typedef {{text: string, revision: string, theirs?: {text: string|null, revision: string}, fault?: string, refused?: boolean}} Draft
 */

/** Events: `state` (detail {path, saved}: the server's answer where it was just confirmed). */
class CaptionDrafts extends EventTarget {
  /** @type {Map<string, Draft>} by the image's path */
  #drafts = new Map();
  #prefix = "";
  #opening = null;
  #sending = new Set();
  #timers = new Map();

  /** Read what an earlier visit left. One workspace's drafts are not another's that is served on the same port. */
  open() {
    this.#opening ??= this.#open().catch((error) => {
      this.#opening = null;
      throw error;
    });
    return this.#opening;
  }

  async #open() {
    const { workspace } = await get("about");
    this.#prefix = `${PREFIX} ${workspace}\n`;
    for (const key of keys()) {
      const draft = key.startsWith(this.#prefix) ? JSON.parse(localStorage.getItem(key)) : null;
      if (draft !== null) this.#drafts.set(key.slice(this.#prefix.length), draft);
    }
    window.addEventListener("storage", ({ key, newValue }) => {
      if (newValue === null && key?.startsWith(this.#prefix)) this.#drop(key.slice(this.#prefix.length));
    });
    document.addEventListener("visibilitychange", () => document.hidden && this.sendAll(true));
    setInterval(() => this.sendAll(), RETRY);
  }

  /** @returns {Draft|undefined} */
  of(path) {
    return this.#drafts.get(path);
  }

  get all() {
    return [...this.#drafts];
  }

  /** Keep what was typed; it is sent after a pause. `revision`: of the text that was edited first. */
  type(path, text, revision) {
    const draft = this.#drafts.get(path);
    this.#keep(path, { ...draft, text, revision: draft?.revision ?? revision });
    clearTimeout(this.#timers.get(path));
    this.#timers.set(path, setTimeout(() => this.send(path), PAUSE));
  }

  /** Forget what was typed. */
  discard(path) {
    this.#drop(path);
    this.#tell(path);
  }

  /** Write what was typed over what somebody else wrote. */
  overwrite(path) {
    const { text, theirs } = this.#drafts.get(path);
    this.#keep(path, { text, revision: theirs.revision });
    return this.send(path);
  }

  /** Save all that can be saved. @param {boolean} [isClosing] the page may be closed before the answer comes */
  sendAll(isClosing = false) {
    return Promise.all(this.all.filter(([, { theirs, refused }]) => !theirs && !refused).map(([path]) => this.send(path, isClosing)));
  }

  /** Save a draft; one that differs from what somebody else wrote waits for a choice. */
  async send(path, isClosing = false) {
    clearTimeout(this.#timers.get(path));
    const draft = this.#drafts.get(path);
    if (draft === undefined || draft.theirs || this.#sending.has(path)) return;
    this.#sending.add(path);
    try {
      this.#confirmed(path, draft.text, await put("caption", { text: draft.text, revision: draft.revision }, { path }, isClosing));
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      await this.#failed(path, draft, error);
    } finally {
      this.#sending.delete(path);
    }
  }

  async #failed(path, draft, error) {
    if (error.status === 409) {
      try {
        const theirs = await get("caption", { path });
        if (theirs.text === draft.text) this.#confirmed(path, draft.text, theirs);
        else this.#note(path, { theirs, fault: undefined });
        return;
      } catch (again) {
        if (!(again instanceof ApiFault)) throw again;
        error = again;
      }
    }
    this.#note(path, { fault: error.problems.map((one) => one.text).join(" "), refused: error.status >= 400 && error.status < 500 && error.status !== 429 });
  }

  #confirmed(path, text, answer) {
    const draft = this.#drafts.get(path);
    if (draft === undefined || draft.text === text) this.#drop(path);
    else this.#keep(path, { text: draft.text, revision: answer.revision });
    this.#tell(path, { text, revision: answer.revision });
    if (this.#drafts.has(path)) this.#timers.set(path, setTimeout(() => this.send(path), PAUSE));
  }

  #note(path, found) {
    const draft = this.#drafts.get(path);
    if (draft !== undefined) this.#keep(path, { ...draft, ...found });
    this.#tell(path);
  }

  #keep(path, draft) {
    this.#drafts.set(path, draft);
    try {
      localStorage.setItem(this.#prefix + path, JSON.stringify(draft));
    } catch (error) {
      // Storage that is full or shut: it is still kept until this tab is closed.
      if (!(error instanceof DOMException)) throw error;
    }
  }

  #drop(path) {
    this.#drafts.delete(path);
    localStorage.removeItem(this.#prefix + path);
  }

  #tell(path, saved = null) {
    this.dispatchEvent(new CustomEvent("state", { detail: { path, saved } }));
  }
}

const keys = () => Array.from({ length: localStorage.length }, (_, at) => localStorage.key(at));

export const drafts = new CaptionDrafts();
