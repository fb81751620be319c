// The prompts that validation draws: a name and a text each, and reference images for those that edit them.

import { button, freshId, h } from "./dom.js";
import { read, renameMember, set, written } from "./jsontext.js";
import { examined, rawEditor } from "./raw.js";
import { referenceList } from "./references.js";

/** The text and the references of an entry, which is a text or an object with both. */
function partsOf(value) {
  if (typeof value === "string") return { prompt: value, references: [] };
  const { prompt, references } = value ?? {};
  const isRight = Array.isArray(references) && references.every((path) => typeof path === "string");
  return { prompt: typeof prompt === "string" ? prompt : JSON.stringify(prompt ?? ""), references: isRight ? references : [] };
}

/** @param {import("./environment.js").Environment} environment */
export function promptsPane(environment) {
  const raw = rawEditor(environment, "prompts", { kind: "object", label: "The file", rows: 14 });
  const body = h("div", { class: "stack" });

  const edit = (text) => environment.edit("prompts", text, "table");
  const text = () => environment.text("prompts");

  function row({ key, node }, locked) {
    const name = freshId("prompt");
    const fault = h("p", { class: "fault", "aria-live": "polite" });
    const { prompt, references } = partsOf(node.value);
    const write = (parts) => edit(set(text(), [key], written(parts.references.length ? parts : parts.prompt, 1)));
    const list = referenceList((paths) => write({ prompt, references: paths }));
    list.show(references, locked);
    return h("li", { class: "prompt" },
      h("div", {}, h("label", { for: name }, "Name"),
        h("input", {
          id: name, value: key, disabled: locked, spellcheck: "false",
          onchange(event) {
            const wanted = event.target.value.trim();
            const taken = read(text()).members.some((member) => member.key === wanted);
            if (wanted === "" || (taken && wanted !== key)) {
              fault.textContent = wanted === "" ? "A name is missing." : `${wanted} is there already.`;
              event.target.value = key;
            } else if (wanted !== key) edit(renameMember(text(), [], key, wanted));
          },
        }), fault),
      h("div", { class: "grow" }, h("label", { for: `${name}-text` }, "Prompt"),
        h("textarea", {
          id: `${name}-text`, rows: "2", disabled: locked, value: prompt,
          onchange: (event) => write({ prompt: event.target.value, references }),
        }), list.node),
      button("", () => edit(set(text(), [key], null)), { icon: "trash", kind: "quiet", label: `Remove ${key}`, disabled: locked }));
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
      ? h("ul", { class: "plain stack" }, members.map((member) => row(member, false)))
      : h("p", { class: "dim" }, root === null ? "The file is no JSON yet: mend it below." : "No prompts yet. Each one you add is drawn at every validation, beside validation_prompt.");
    body.replaceChildren(list, h("div", {}, button("Add a prompt", add, { icon: "plus", disabled: root === null })));
  }

  environment.addEventListener("edit", (event) => {
    if (event.detail.document === "prompts") show();
  });
  show();
  return h("div", { class: "two" },
    h("section", { class: "sheet stack", "aria-labelledby": "prompts-title" },
      h("h2", { id: "prompts-title" }, "Prompts"),
      h("p", { class: "hint" }, "Drawn at each validation, so that pictures can be compared from step to step."), body),
    h("section", { class: "sheet", "aria-label": "The prompts as JSON" }, raw.node));
}
