// The form of one dataset entry.

import { freshId, h } from "./dom.js";
import { fieldRow } from "./field.js";
import { examined } from "./raw.js";
import { set } from "./jsontext.js";

/** Names of the dataset types. */
export const KINDS = { image: "Image dataset", eval: "Held-out dataset", conditioning: "References or masks", text_embeds: "Text store" };

export const kindOf = (entry) => (entry?.dataset_type in KINDS ? entry.dataset_type : "image");

/** Content of a conditioning dataset, by `conditioning_type`. */
export const CONDITIONS = {
  reference_loose: "References of any shape",
  reference_strict: "References with the crop of their image",
  mask: "Masks: white areas are trained, black ones are not",
  segmentation: "Masks: every gray counts as white",
};

export const isReference = (entry) => entry?.conditioning_type?.startsWith("reference") ?? false;

/** The type of an entry in words. */
export function kindText(entry) {
  const kind = kindOf(entry);
  if (kind !== "conditioning" || !(entry.conditioning_type in CONDITIONS)) return KINDS[kind];
  return isReference(entry) ? "References" : "Masks";
}

/**
 * @param {{image_set: object[], conditioning_set: object[], text_store: object[]}} schema @param {import("./environment.js").Environment} environment
 * @param {number} index the entry's
 */
export function datasetForm(schema, environment, index) {
  const { root } = examined(environment.text("datasets"), "array");
  const kind = kindOf(root.items[index].value);
  const fields = { conditioning: schema.conditioning_set, text_embeds: schema.text_store }[kind] ?? schema.image_set;
  const ids = root.items.filter((item) => kindOf(item.value) === "conditioning").map((item) => item.value.id);
  const withChoices = (field) => (field.name === "conditioning_data" ? { ...field, kind: "names", choices: ids.filter(Boolean) } : field);
  const rows = fields.map(withChoices).map((field) => fieldRow(field, (raw) =>
    environment.edit("datasets", set(environment.text("datasets"), [index, field.name], raw), "form")));
  const all = h("input", { type: "checkbox", id: freshId("all"), onchange: filter });
  const node = h("div", { class: "stack" },
    h("div", { class: "row" }, h("label", { class: "tick" }, all, "All options")),
    h("div", {}, rows.map((row) => row.node)));

  function filter() {
    for (const row of rows) {
      const isBasic = (row.field.basic || row.field.required) && !(row.field.kind === "choice" && row.field.choices.length === 1);
      row.node.hidden = !(all.checked || isBasic || row.differs || row.wrong);
    }
  }

  function show() {
    const text = environment.text("datasets");
    const { root: list } = examined(text, "array");
    const entry = list?.items[index];
    const members = entry?.kind === "object" ? entry.members : null;
    for (const row of rows) {
      const member = members?.find(({ key }) => key === row.field.name);
      if (members !== null) row.show(member && { value: member.node.value, raw: text.slice(member.node.start, member.node.end) });
      row.lock(members === null);
    }
    filter();
  }

  /** Show each problem beside its option. @param {import("./api.js").Problem[]} problems of this entry */
  function showProblems(problems) {
    for (const row of rows) {
      // Messages name an entry's option as "…, ID: NAME = VALUE" or "…, ID: NAME: …".
      const { name } = row.field;
      const ofRow = problems.filter(({ key, found }) => key === name || found.includes(`: ${name} = `) || found.includes(`: ${name}: `));
      row.showProblems(ofRow);
      row.wrong = ofRow.length > 0;
    }
    filter();
  }

  show();
  return { node, kind, show, showProblems };
}
