// Edit many captions at once, with a preview.

import { post } from "./api.js";
import { drafts } from "./captiondrafts.js";
import { pausing } from "./check.js";
import { diffBlock } from "./diff.js";
import { dialog, fill, freshId, h, problemPanel } from "./dom.js";
import { count, plural } from "./format.js";

const SHOWN = 5;

/**
 * Ask how to edit the captions of `names` (null: of all `total`), preview the edit and apply it.
 * @param {{folder: string, names: string[]|null, total: number, whole: boolean}} options `whole`: each file is one caption
 * @returns {Promise<object|null>} the result; null if nothing was changed
 */
export async function editCaptions({ folder, names, total, whole }) {
  await drafts.sendAll();
  const id = freshId("edit");
  const input = (name, label) => {
    const node = h("input", { id: `${id}-${name}`, autocomplete: "off", oninput: () => changed() });
    return { node, row: h("div", {}, h("label", { for: node.id }, label), node) };
  };
  const find = input("find", "Find");
  const replace = input("replace", "Replace with");
  const regex = h("input", { type: "checkbox", onchange: () => changed() });
  const added = input("added", "Text");
  const kinds = [["replace", "Find and replace"], ["prepend", "Add before"], ["append", "Add after"]];
  const radios = kinds.map(([value, label]) => h("label", {}, h("input", { type: "radio", name: id, value, checked: value === "replace", onchange: () => changed() }), label));
  const replacing = h("div", { class: "stack" }, find.row, replace.row,
    h("label", { class: "tick" }, regex, "Regular expression (Python syntax; each line is a caption)"));
  const preview = h("div", { class: "stack", "aria-live": "polite" });
  let accept = null;
  let previewed = null;

  const kind = () => radios.map((label) => label.firstElementChild).find((radio) => radio.checked).value;
  const edit = () => ({ folder, names, whole, ...(kind() === "replace"
    ? { find: find.node.value, replace: replace.node.value, regex: regex.checked }
    : { [kind()]: added.node.value }) });

  const previewing = pausing(300, async (signal) => {
    if ((kind() === "replace" ? find.node.value : added.node.value) === "") {
      preview.replaceChildren(h("p", { class: "hint" }, "A preview of the changes appears here."));
      return;
    }
    try {
      previewed = await post("images/captions", { ...edit(), dry_run: true }, {}, signal);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      preview.replaceChildren(problemPanel(error));
      return;
    }
    show(previewed);
    accept.disabled = previewed.changed === 0;
    accept.textContent = previewed.changed === 0 ? "Change" : `Change ${plural(previewed.changed, "caption")}`;
  });

  function changed() {
    previewed = null;
    accept.disabled = true;
    replacing.hidden = kind() !== "replace";
    added.row.hidden = kind() === "replace";
    previewing.later();
  }

  function show({ images, changed: changing, emptied, changes, left_out: leftOut }) {
    preview.replaceChildren();
    fill(preview,
      h("p", {}, changing === 0 ? "No caption changes." : `${plural(changing, "caption")} of ${plural(images, "image")} ${changing === 1 ? "changes" : "change"}${changing > SHOWN ? `; the first ${SHOWN}` : ""}:`),
      emptied ? h("p", { class: "panel warn" }, `${plural(emptied, "caption")} would become empty.`) : null,
      changes.slice(0, SHOWN).map(({ file, before, after }) => h("div", {}, h("p", { class: "small path" }, file), diffBlock(before.trimEnd(), after.trimEnd()))),
      leftOut.length ? h("p", { class: "hint" }, `Not changed: ${leftOut.map(({ name, detail }) => `${name} (${detail})`).slice(0, SHOWN).join(", ")}`) : null);
  }

  const answer = await dialog({
    title: `Captions of ${names === null ? `all ${count(total)} images` : plural(names.length, "image")}`,
    wide: true,
    body: [h("div", { class: "choices", role: "group", "aria-label": "Kind of edit" }, radios), replacing, added.row, preview],
    actions: [{ label: "Cancel", value: null }, { label: "Change", value: "yes", kind: "primary", disabled: true }],
    opened(box) {
      accept = box.querySelector('[data-action="yes"]');
      changed();
      find.node.focus();
    },
  });
  previewing.stop();
  return answer === null || previewed === null ? null : post("images/captions", { ...edit(), revision: previewed.revision });
}
