// A text editor of a document, kept in sync with the form.

import { freshId, h } from "./dom.js";
import { JsonFault, read } from "./jsontext.js";

/** Parse a text: its root node, or the fault. With `kind`, a root of another kind is a fault. */
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
 * @param {{kind: string|null, label: string, rows?: number}} options `kind`: of the root; null disables the check
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
    const { fault: syntaxFault } = examined(text, kind);
    if (syntaxFault === null) {
      fault.replaceChildren();
      area.removeAttribute("aria-invalid");
      return;
    }
    area.setAttribute("aria-invalid", "true");
    fault.replaceChildren(`Line ${syntaxFault.line}, column ${syntaxFault.column}: ${syntaxFault.message}. The form is locked until you fix this. `,
      h("button", { type: "button", class: "tiny", onclick: () => go(syntaxFault.at) }, "Go to it"));
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
