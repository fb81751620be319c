// A document as text, beside the form and in step with it.

import { freshId, h } from "./dom.js";
import { JsonFault, read } from "./jsontext.js";

/** What a text holds: its root node, or the fault. Only a `kind` will do, if one is asked for. */
export function examined(text, kind = null) {
  try {
    const root = read(text);
    if (kind !== null && root.kind !== kind) {
      return { root: null, fault: new JsonFault(text, root.start, `this must be ${kind === "array" ? "a list" : "an object"}`) };
    }
    return { root, fault: null };
  } catch (error) {
    if (!(error instanceof JsonFault)) throw error;
    return { root: null, fault: error };
  }
}

/**
 * @param {import("./environment.js").Environment} environment @param {import("./environment.js").DocumentName} document
 * @param {{kind: string|null, label: string, rows?: number}} what `kind` null: not checked
 */
export function rawEditor(environment, document, { kind, label, rows = 24 }) {
  const id = freshId("raw");
  const fault = h("div", { class: "fault", id: `${id}-fault`, "aria-live": "polite" });
  const area = h("textarea", {
    id, class: "mono raw", rows: String(rows), spellcheck: "false", autocapitalize: "off", "aria-describedby": `${id}-fault ${id}-path`,
    oninput: () => environment.edit(document, area.value, "raw"),
  });

  function show() {
    const text = environment.text(document);
    if (area.value !== text) area.value = text;
    if (kind === null) return;
    const { fault: wrong } = examined(text, kind);
    if (wrong === null) {
      fault.replaceChildren();
      area.removeAttribute("aria-invalid");
      return;
    }
    area.setAttribute("aria-invalid", "true");
    fault.replaceChildren(`Line ${wrong.line}, column ${wrong.column}: ${wrong.message}. The form waits until this is mended. `,
      h("button", { type: "button", class: "tiny", onclick: () => go(wrong.at) }, "Go there"));
  }

  function go(at) {
    area.focus();
    area.setSelectionRange(at, at + 1);
    const lines = area.value.slice(0, at).split("\n").length;
    area.scrollTop = Math.max(0, (lines - 5) * Number.parseFloat(getComputedStyle(area).lineHeight));
  }

  const listen = (event) => {
    if (event.detail.document === document) show();
  };
  environment.addEventListener("edit", listen);
  show();
  return {
    node: h("div", { class: "stack" },
      h("label", { for: id }, label),
      h("p", { class: "hint mono path", id: `${id}-path` }, environment.documents[document].path),
      area, fault),
    go,
    focus: () => area.focus(),
  };
}
