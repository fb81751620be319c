// An environment in the editor: its files, the unsaved drafts, and changes made on disk meanwhile.

import { ApiFault, get, put } from "./api.js";
import { diffBlock } from "./diff.js";
import { dialog, toast } from "./dom.js";

const POLL = 5000;

/** @typedef {"config"|"datasets"|"prompts"} DocumentName */
/** @typedef {{path: string, text: string|null, revision: string}} Document */

const DOCUMENTS = ["config", "datasets", "prompts"];

/** Initial text of a document that does not exist. */
const EMPTY = { config: "{}\n", datasets: "[]\n", prompts: "{}\n" };

/**
 * Events: `edit` (detail {document, source}), `state` (the drafts, or the files on disk, changed).
 */
export class Environment extends EventTarget {
  constructor(detail) {
    super();
    this.name = detail.name;
    /** @type {Record<DocumentName, Document>} as last read or written */
    this.documents = detail.documents;
    /** @type {Partial<Record<DocumentName, string>>} */
    this.drafts = {};
    /** @type {Partial<Record<DocumentName, Document>>} changed on disk while there is a draft */
    this.outside = {};
    this.gone = false;
  }

  /** @throws {ApiFault} 404, there is no environment of this name */
  static async open(name) {
    return new Environment(await get("environment", { name }));
  }

  /** The current text, drafts included; the initial text for a missing document. */
  text(document) {
    return this.drafts[document] ?? this.documents[document].text ?? EMPTY[document];
  }

  /** As `text`, but null if there is neither a file nor a draft. */
  textOrNull(document) {
    return this.drafts[document] ?? this.documents[document].text;
  }

  isToml(document) {
    return this.documents[document].path.endsWith(".toml");
  }

  get unsaved() {
    return DOCUMENTS.filter((document) => this.drafts[document] !== undefined);
  }

  /** The request body of `check` and `plan`. */
  draft() {
    return { name: this.name, config: this.text("config"), datasets: this.textOrNull("datasets"), prompts: this.textOrNull("prompts") };
  }

  /** Change a draft. `source` tells listeners where the change comes from. */
  edit(document, text, source) {
    if (text === this.text(document)) return;
    if (text === this.documents[document].text) delete this.drafts[document];
    else this.drafts[document] = text;
    this.#notify("edit", { document, source });
    this.#notify("state");
  }

  /** Save all drafts. Returns false if the user cancelled. */
  async save() {
    for (const document of this.unsaved) {
      if (!(await this.#write(document))) return false;
    }
    return true;
  }

  async #write(document) {
    const text = this.text(document);
    const { revision } = this.documents[document];
    try {
      this.#adopt(document, await put("environment/document", { text, revision }, { name: this.name, document }));
      return true;
    } catch (error) {
      if (!(error instanceof ApiFault) || error.status !== 409) throw error;
    }
    const { documents } = await get("environment", { name: this.name });
    return this.settle(document, documents[document]);
  }

  /** Ask which of two texts to keep, and keep it. Returns false if the user cancelled. */
  async settle(document, theirs) {
    const mine = this.text(document);
    const choice = await dialog({
      title: `${theirs.path} has changed on disk`,
      wide: true,
      body: ["The file was changed after this page loaded it. Lines with − are in the file, lines with + are yours.",
        diffBlock(theirs.text ?? "", mine)],
      actions: [
        { label: "Cancel", value: null },
        { label: "Take theirs", value: "theirs" },
        { label: "Keep mine", value: "mine", kind: "primary" },
      ],
    });
    if (choice === null) {
      this.outside[document] = theirs;
      this.#notify("state");
      return false;
    }
    this.documents[document] = theirs;
    delete this.outside[document];
    if (choice === "mine") return this.#write(document);
    this.#adopt(document, theirs);
    return true;
  }

  #adopt(document, read) {
    const before = this.text(document);
    this.documents[document] = read;
    delete this.drafts[document];
    delete this.outside[document];
    this.gone = false;
    if (this.text(document) !== before) this.#notify("edit", { document, source: "disk" });
    this.#notify("state");
  }

  /** Poll the files. Returns a function that stops it. */
  watch() {
    let last = "";
    const poll = async () => {
      if (window.document.visibilityState !== "visible") return;
      let detail;
      try {
        detail = await get("environment", { name: this.name });
      } catch (error) {
        if (!(error instanceof ApiFault)) throw error;
        this.gone = error.status === 404;
        if (last !== error.message) toast(error.message, "bad");
        last = error.message;
        this.#notify("state");
        return;
      }
      last = "";
      for (const document of DOCUMENTS) this.#compare(document, detail.documents[document]);
    };
    const timer = setInterval(poll, POLL);
    return () => clearInterval(timer);
  }

  #compare(document, read) {
    if (read.revision === (this.outside[document] ?? this.documents[document]).revision) return;
    if (this.drafts[document] === undefined) {
      this.#adopt(document, read);
      toast(`${read.path} has changed on disk and was loaded again.`);
      return;
    }
    if (read.text === this.drafts[document]) {
      this.#adopt(document, read);
      return;
    }
    this.outside[document] = read;
    this.#notify("state");
  }

  #notify(type, detail = null) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
