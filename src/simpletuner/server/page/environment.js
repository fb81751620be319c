// An environment that is being edited: what its files hold, what was changed here, and what was changed outside.

import { ApiFault, get, put } from "./api.js";
import { diffBlock } from "./diff.js";
import { dialog, toast } from "./dom.js";

const POLL = 5000;

/** @typedef {"config"|"datasets"|"prompts"} DocumentName */
/** @typedef {{path: string, text: string|null, revision: string}} Document */

const DOCUMENTS = ["config", "datasets", "prompts"];

/** How a document starts that is not there. */
const EMPTY = { config: "{}\n", datasets: "[]\n", prompts: "{}\n" };

/**
 * Events: `edit` (detail {document, source}), `state` (what is unsaved, or stands otherwise on the disk, has changed).
 */
export class Environment extends EventTarget {
  constructor(detail) {
    super();
    this.name = detail.name;
    /** @type {Record<DocumentName, Document>} as last read or written */
    this.documents = detail.documents;
    /** @type {Partial<Record<DocumentName, string>>} */
    this.drafts = {};
    /** @type {Partial<Record<DocumentName, Document>>} changed outside while there is a draft */
    this.outside = {};
    this.gone = false;
  }

  /** @throws {ApiFault} 404 where there is none of this name */
  static async open(name) {
    return new Environment(await get("environment", { name }));
  }

  /** The text as it stands here; a document that is not there starts empty. */
  text(document) {
    return this.drafts[document] ?? this.documents[document].text ?? EMPTY[document];
  }

  /** As `text`, but null where there is neither a file nor a draft. */
  given(document) {
    return this.drafts[document] ?? this.documents[document].text;
  }

  isToml(document) {
    return this.documents[document].path.endsWith(".toml");
  }

  get unsaved() {
    return DOCUMENTS.filter((document) => this.drafts[document] !== undefined);
  }

  /** What `check` and `plan` take. */
  draft() {
    return { name: this.name, config: this.text("config"), datasets: this.given("datasets"), prompts: this.given("prompts") };
  }

  /** Change a text here. `source` tells listeners who did. */
  edit(document, text, source) {
    if (text === this.text(document)) return;
    if (text === this.documents[document].text) delete this.drafts[document];
    else this.drafts[document] = text;
    this.#tell("edit", { document, source });
    this.#tell("state");
  }

  /** Write what is unsaved. False where a person chose not to. */
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

  /** Ask which of two texts to keep, and do it. False where nothing was chosen. */
  async settle(document, theirs) {
    const mine = this.text(document);
    const choice = await dialog({
      title: `${theirs.path} was changed outside`,
      wide: true,
      body: ["It was changed by something else since it was read here. Lines with − stand in the file, lines with + stand here.",
        diffBlock(theirs.text ?? "", mine)],
      actions: [
        { label: "Cancel", value: null },
        { label: "Take theirs", value: "theirs" },
        { label: "Keep mine", value: "mine", kind: "primary" },
      ],
    });
    if (choice === null) {
      this.outside[document] = theirs;
      this.#tell("state");
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
    if (this.text(document) !== before) this.#tell("edit", { document, source: "disk" });
    this.#tell("state");
  }

  /** Look at the files now and then. Returns what ends it. */
  watch() {
    let last = "";
    const look = async () => {
      if (window.document.visibilityState !== "visible") return;
      let detail;
      try {
        detail = await get("environment", { name: this.name });
      } catch (error) {
        if (!(error instanceof ApiFault)) throw error;
        this.gone = error.status === 404;
        if (last !== error.message) toast(error.message, "bad");
        last = error.message;
        this.#tell("state");
        return;
      }
      last = "";
      for (const document of DOCUMENTS) this.#compare(document, detail.documents[document]);
    };
    const timer = setInterval(look, POLL);
    return () => clearInterval(timer);
  }

  #compare(document, read) {
    if (read.revision === (this.outside[document] ?? this.documents[document]).revision) return;
    if (this.drafts[document] === undefined) {
      this.#adopt(document, read);
      toast(`${read.path} was changed outside and read again.`);
      return;
    }
    if (read.text === this.drafts[document]) {
      this.#adopt(document, read);
      return;
    }
    this.outside[document] = read;
    this.#tell("state");
  }

  #tell(type, detail = null) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
