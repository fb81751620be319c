// The validation prompts: a name and a text each, with reference images for prompts that edit images.

import { button, freshId, h, toast } from "./dom.js";
import { read, renameMember, set, indentedJson } from "./jsontext.js";
import { examined, rawEditor } from "./raw.js";
import { referenceList } from "./references.js";

/** The prompt and references of an entry, which is a string or an object with both; null for anything else. */
function partsOf({ kind, value }) {
  if (kind === "string") return { prompt: value, references: [] };
  if (kind !== "object") return null;
  const { prompt = "", references = [], ...others } = value;
  const isValid = typeof prompt === "string" && Array.isArray(references) && references.every((path) => typeof path === "string");
  return isValid && Object.keys(others).length === 0 ? { prompt, references } : null;
}

/** @param {import("./environment.js").Environment} environment */
export function promptsPane(environment) {
  const raw = rawEditor(environment, "prompts", { kind: "object", label: "The file", rows: 14 });
  const body = h("div", { class: "stack" });

  const edit = (text) => environment.edit("prompts", text, "table");
  const text = () => environment.text("prompts");

  /** The current parts of an entry in the file; null if there is no such entry. */
  function presentParts(key) {
    const member = examined(text(), "object").root?.members.find((one) => one.key === key);
    return member ? partsOf(member.node) : null;
  }

  function row({ key, node }) {
    const name = freshId("prompt");
    const fault = h("p", { class: "fault", "aria-live": "polite" });
    const parts = partsOf(node);
    /** Change parts of the entry. It may have changed since this row was built, because uploads take time. */
    const write = (changed) => {
      const present = presentParts(key);
      if (present === null) {
        toast(`The prompt ${key} was changed or removed meanwhile, so no references were added to it.`, "bad");
        return;
      }
      const { prompt, references } = { ...present, ...changed };
      // A row on the page already shows the change, and the user may be typing in it.
      environment.edit("prompts", set(text(), [key], indentedJson(references.length ? { prompt, references } : prompt, 1)), list.node.isConnected ? "row" : "table");
    };
    const list = referenceList((references) => write({ references }), () => presentParts(key)?.references ?? []);
    list.show(parts?.references ?? []);
    return h("li", { class: "prompt" },
      h("div", {}, h("label", { for: name }, "Name"),
        h("input", {
          id: name, value: key, spellcheck: "false",
          onchange(event) {
            const newKey = event.target.value.trim();
            const isTaken = read(text()).members.some((member) => member.key === newKey);
            if (newKey === "" || (isTaken && newKey !== key)) {
              fault.textContent = newKey === "" ? "Enter a name." : `${newKey} exists already.`;
              event.target.value = key;
            } else if (newKey !== key) edit(renameMember(text(), [], key, newKey));
          },
        }), fault),
      h("div", { class: "grow" }, h("label", { for: `${name}-text` }, "Prompt"),
        h("textarea", {
          id: `${name}-text`, rows: "2", disabled: parts === null, value: parts?.prompt ?? JSON.stringify(node.value),
          oninput: (event) => write({ prompt: event.target.value }),
        }),
        parts === null ? h("p", { class: "hint" }, "This is not a prompt with a list of references: edit it in the file.") : list.node),
      button("", () => edit(set(text(), [key], null)), { icon: "trash", kind: "quiet", label: `Remove ${key}` }));
  }

  function add() {
    const taken = new Set(read(text()).members.map((member) => member.key));
    let number = taken.size + 1;
    while (taken.has(`prompt_${number}`)) number += 1;
    edit(set(text(), [`prompt_${number}`], '""'));
    body.querySelector("li:last-child textarea")?.focus();
  }

  function show() {
    const { root } = examined(text(), "object");
    const members = (root?.members ?? []).filter(({ key }) => !key.startsWith("//"));  // a comment
    const list = members.length
      ? h("ul", { class: "plain stack" }, members.map(row))
      : h("p", { class: "dim" }, root === null ? "The file is not valid JSON: fix it below." : "No prompts yet. Each validation generates an image for each prompt, besides validation_prompt.");
    body.replaceChildren(list, h("div", {}, button("Add a prompt", add, { icon: "plus", disabled: root === null })));
  }

  environment.addEventListener("edit", (event) => {
    if (event.detail.document === "prompts" && event.detail.source !== "row") show();
  });
  show();
  return h("div", { class: "two" },
    h("section", { class: "sheet stack", "aria-labelledby": "prompts-title" },
      h("h2", { id: "prompts-title" }, "Prompts"),
      h("p", { class: "hint" }, "Each validation generates images for these prompts, so that you can compare them from step to step."), body),
    h("section", { class: "sheet", "aria-label": "The prompts as JSON" }, raw.node));
}
