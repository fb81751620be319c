// Upload files and whole folders, chosen by a button or dropped: a few at a time, with one line of progress.

import { ApiFault, get, upload } from "./api.js";
import { button, fill, h, toast } from "./dom.js";
import { ensureFolder } from "./folders.js";
import { count, size, plural } from "./format.js";

const AT_ONCE = 4;
const CAPTION = /\.(txt|caption)$/i;

/** A file and its folder below the dropped folder, "" for none. @typedef {{file: File, inner: string}} Incoming */

/**
 * All dropped files, with those in folders and their subfolders. Hidden files are skipped.
 * @param {DataTransfer} transfer @returns {Promise<{name: string, incoming: Incoming[]}>} `name`: the folder's, if a single folder was
 *   dropped; its files are then at the top level
 */
export async function dropped(transfer) {
  // Read before the first await: afterwards the list is empty. Data dropped from another program has no entry.
  const entries = [...transfer.items].filter(({ kind }) => kind === "file").map((item) => item.webkitGetAsEntry() ?? item.getAsFile());
  const [first] = entries;
  if (entries.length === 1 && first.isDirectory) return { name: first.name, incoming: await inside(first, "") };
  const incoming = [];
  for (const entry of entries) incoming.push(...(await incomingOf(entry, "")));
  return { name: "", incoming };
}

async function incomingOf(entry, inner) {
  if (isHidden(entry.name)) return [];
  if (entry instanceof File) return [{ file: entry, inner }];
  if (entry.isDirectory) return inside(entry, inner === "" ? entry.name : `${inner}/${entry.name}`);
  return [{ file: await new Promise((resolve, reject) => { entry.file(resolve, reject); }), inner }];
}

async function inside(folder, inner) {
  const reader = folder.createReader();
  const incoming = [];
  for (;;) {
    const entries = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); });
    if (entries.length === 0) return incoming;
    for (const entry of entries) incoming.push(...(await incomingOf(entry, inner)));
  }
}

const isHidden = (name) => name.startsWith(".") || /^(thumbs\.db|desktop\.ini)$/i.test(name);

/** The files of a folder input. @param {Iterable<File>} files @returns {{name: string, incoming: Incoming[]}} */
export function chosen(files) {
  const incoming = [];
  let name = "";
  for (const file of files) {
    const [top, ...inner] = file.webkitRelativePath.split("/");
    name = top;
    if (!inner.some(isHidden)) incoming.push({ file, inner: inner.slice(0, -1).join("/") });
  }
  return { name, incoming };
}

/** Accept dropped files on `node`. @param {HTMLElement} node @param {(what: {name: string, incoming: Incoming[]}) => void} take */
export function droppable(node, take) {
  let depth = 0;
  const carries = (event) => [...event.dataTransfer.types].includes("Files");
  const end = () => {
    depth = 0;
    node.classList.remove("over");
  };
  node.addEventListener("dragenter", (event) => {
    if (!carries(event)) return;
    depth += 1;
    node.classList.add("over");
  });
  node.addEventListener("dragleave", () => {
    depth -= 1;
    if (depth <= 0) end();
  });
  node.addEventListener("dragover", (event) => {
    if (carries(event)) event.preventDefault();
  });
  node.addEventListener("drop", async (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    event.stopPropagation();
    end();
    take(await dropped(event.dataTransfer));
  });
}

/** A button that chooses a whole folder. @param {string} text @param {(what: {name: string, incoming: Incoming[]}) => void} take */
export function folderButton(text, take, options = {}) {
  const input = h("input", { type: "file", webkitdirectory: true, hidden: true, "aria-label": text, onchange() {
    take(chosen([...input.files]));
    input.value = "";
  } });
  return h("span", {}, button(text, () => input.click(), { icon: "folder", ...options }), input);
}

/**
 * The controls that upload files into `folder`. They may be removed and shown again while an upload runs.
 * @param {string} folder @param {() => void} arrived called when a batch has ended
 * @returns {{node: HTMLElement, take: (incoming: Incoming[]) => Promise<void>}}
 */
export function uploads(folder, arrived) {
  const line = h("div", { "aria-live": "polite" });
  const input = h("input", { type: "file", multiple: true, hidden: true, "aria-label": "Files to add", accept: "image/*,.txt,.caption,.zip,.avif", onchange() {
    take([...input.files].map((file) => ({ file, inner: "" })));
    input.value = "";
  } });
  const node = h("div", { class: "stack" },
    h("div", { class: "row" },
      button("Add files", () => input.click(), { icon: "upload" }), input,
      folderButton("Add folder", ({ incoming }) => take(incoming)),
      h("span", { class: "hint" }, "or drop images, caption files (.txt, .caption), folders and zips here")),
    line);
  let batch = null;

  async function take(incoming) {
    if (batch !== null) {
      toast("An upload is running: wait for it, or cancel it.", "bad");
      return;
    }
    batch = new Batch(folder.replace(/\/+$/, ""), line);
    try {
      await batch.send(incoming);
    } finally {
      const { unsent } = batch;
      batch.finish(unsent.length ? button("Send the rest", () => take(unsent), { kind: "tiny" }) : null);
      batch = null;
    }
    arrived();
  }

  return { node, take };
}

/** One upload of several files into a folder, and the line that shows its progress. */
class Batch {
  constructor(folder, line) {
    this.folder = folder;
    this.line = line;
    this.stopping = new AbortController();
    /** @type {Incoming[]} */
    this.unsent = [];
    this.saved = { image: 0, caption: 0 };
    /** @type {{name: string, reason: string}[]} */
    this.refused = [];
    this.fault = "";
  }

  /** @param {Incoming[]} incoming */
  async send(incoming) {
    this.unsent = [...incoming];
    let rules;
    try {
      rules = await get("upload");
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      this.#stop(error);
      return;
    }
    const accepted = incoming.filter((one) => this.#isAccepted(one.file, rules));
    this.total = accepted.reduce((sum, { file }) => sum + file.size, 0);
    this.files = accepted.length;
    this.sent = this.done = 0;
    this.bar = h("progress", { max: String(Math.max(1, this.total)), "aria-label": "Upload" });
    this.words = h("p", { class: "grow numbers" });
    this.line.replaceChildren(h("div", { class: "stack tight" },
      h("div", { class: "row" }, this.words, button("Cancel", () => this.cancel(), { icon: "stop", kind: "tiny" })), this.bar));
    this.#show();
    this.unsent = [...accepted];
    try {
      for (const inner of new Set(["", ...accepted.map((one) => one.inner)])) await ensureFolder(inner ? `${this.folder}/${inner}` : this.folder);
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      this.#stop(error);
    }
    const waiting = [...accepted];
    const work = async () => {
      while (waiting.length && !this.stopping.signal.aborted) await this.#sendOne(waiting.shift());
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
  }

  async #sendOne(entry) {
    const { file, inner } = entry;
    let sentBytes = 0;
    try {
      const target = inner ? `${this.folder}/${inner}` : this.folder;
      const { saved, refused } = await upload("PUT", "upload", { folder: target, name: file.name }, file, (share) => {
        this.sent += share * file.size - sentBytes;
        sentBytes = share * file.size;
        this.#show();
      }, this.stopping.signal);
      for (const path of saved) this.saved[CAPTION.test(path) ? "caption" : "image"] += 1;
      this.refused.push(...refused);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiFault)) throw error;
      if (error.status === 0 || error.status === 507) {
        this.#stop(error);
        return;
      }
      this.refused.push({ name: file.name, reason: error.problems.map(({ text }) => text).join(" ") });
    }
    this.unsent.splice(this.unsent.indexOf(entry), 1);
    this.sent += file.size - sentBytes;
    this.done += 1;
    this.#show();
  }

  #isAccepted({ name, size: bytes }, { suffixes, largest }) {
    const suffix = name.slice(name.lastIndexOf(".")).toLowerCase();
    const limit = largest[suffix] ?? largest[""];
    if (!suffixes.includes(suffix)) this.refused.push({ name, reason: "neither an image nor a caption file" });
    else if (bytes > limit) this.refused.push({ name, reason: `too large: at most ${size(limit)}` });
    else return true;
    return false;
  }

  #stop(error) {
    this.fault ||= error.problems.map(({ text }) => text).join(" ");
    this.cancel();
  }

  cancel() {
    this.stopping.abort();
  }

  #show() {
    this.bar.value = this.sent;
    this.words.textContent = `${count(this.done)} of ${plural(this.files, "file")}, ${size(Math.round(this.sent))} of ${size(this.total)}`;
  }

  /** Replace the progress by a one-line summary. @param {HTMLElement|null} retry button below it */
  finish(retry) {
    const { image, caption } = this.saved;
    const added = [image ? plural(image, "image") : "", caption ? plural(caption, "caption") : ""].filter(Boolean).join(" and ") || "nothing";
    const parts = [`${added} added`, this.refused.length ? `${count(this.refused.length)} refused` : "", this.unsent.length ? `${count(this.unsent.length)} not sent` : ""];
    const text = parts.filter(Boolean).join(", ");
    const reasons = new Map();
    for (const { name, reason } of this.refused) reasons.set(reason, [...(reasons.get(reason) ?? []), name]);
    if (!this.line.isConnected) toast(`${this.folder}: ${text}.`);
    this.line.replaceChildren();
    fill(this.line,
      reasons.size === 0 ? h("p", { class: "hint" }, text)
        : h("details", {}, h("summary", {}, text), h("ul", {}, [...reasons].map(([reason, names]) =>
          h("li", {}, h("strong", {}, `${count(names.length)}: ${reason}`), h("span", { class: "small dim path" }, ` ${names.slice(0, 20).join(", ")}${names.length > 20 ? ", …" : ""}`))))),
      this.fault ? h("p", { class: "fault", role: "alert" }, this.fault) : null, retry);
  }
}
