// Caption drafts: stored in this browser and sent repeatedly until the server confirms them.

import { ApiFault, get, put } from "./api.js";

const PREFIX = "simpletuner caption";
const PAUSE = 1000;
const RETRY = 3000;

/**
 * A caption that is not saved yet. `revision`: of the text before the edit; `theirs`: the text that somebody else saved
 * meanwhile; `fault`: why it is not saved.
 * @typedef {{text: string, revision: string, theirs?: {text: string|null, revision: string}, fault?: string, refused?: boolean}} Draft
 */

/** Events: `state` (detail {path, saved}: the server's answer if the draft was just saved). */
class CaptionDrafts extends EventTarget {
  /** @type {Map<string, Draft>} by the image's path */
  #drafts = new Map();
  #prefix = "";
  #opening = null;
  #sending = new Set();
  #timers = new Map();

  /** Load the drafts of an earlier visit. They are stored per workspace, since one port may serve different ones. */
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

  /** Store the typed text and send it after a pause. `revision`: of the text before the edit. */
  type(path, text, revision) {
    const draft = this.#drafts.get(path);
    this.#store(path, { ...draft, text, revision: draft?.revision ?? revision });
    clearTimeout(this.#timers.get(path));
    this.#timers.set(path, setTimeout(() => this.send(path), PAUSE));
  }

  /** Discard a draft. */
  discard(path) {
    this.#drop(path);
    this.#notify(path);
  }

  /** Save a draft over the text that somebody else saved. */
  overwrite(path) {
    const { text, theirs } = this.#drafts.get(path);
    this.#store(path, { text, revision: theirs.revision });
    return this.send(path);
  }

  /** Send all drafts that need no decision. @param {boolean} [isClosing] the page may close before the response */
  sendAll(isClosing = false) {
    return Promise.all(this.all.filter(([, { theirs, refused }]) => !theirs && !refused).map(([path]) => this.send(path, isClosing)));
  }

  /** Send a draft. If somebody else saved a different text, the draft waits for the user's decision. */
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
        else this.#update(path, { theirs, fault: undefined });
        return;
      } catch (second) {
        if (!(second instanceof ApiFault)) throw second;
        error = second;
      }
    }
    this.#update(path, { fault: error.problems.map((one) => one.text).join(" "), refused: error.status >= 400 && error.status < 500 && error.status !== 429 });
  }

  #confirmed(path, text, answer) {
    const draft = this.#drafts.get(path);
    if (draft === undefined || draft.text === text) this.#drop(path);
    else this.#store(path, { text: draft.text, revision: answer.revision });
    this.#notify(path, { text, revision: answer.revision });
    if (this.#drafts.has(path)) this.#timers.set(path, setTimeout(() => this.send(path), PAUSE));
  }

  #update(path, changes) {
    const draft = this.#drafts.get(path);
    if (draft !== undefined) this.#store(path, { ...draft, ...changes });
    this.#notify(path);
  }

  #store(path, draft) {
    this.#drafts.set(path, draft);
    try {
      localStorage.setItem(this.#prefix + path, JSON.stringify(draft));
    } catch (error) {
      // Storage is full or blocked: the draft lives until this tab is closed.
      if (!(error instanceof DOMException)) throw error;
    }
  }

  #drop(path) {
    this.#drafts.delete(path);
    localStorage.removeItem(this.#prefix + path);
  }

  #notify(path, saved = null) {
    this.dispatchEvent(new CustomEvent("state", { detail: { path, saved } }));
  }
}

const keys = () => Array.from({ length: localStorage.length }, (_, at) => localStorage.key(at));

export const drafts = new CaptionDrafts();
