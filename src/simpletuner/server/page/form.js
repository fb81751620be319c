// The form of all options: sections, search, and which rows are shown.

import { freshId, h } from "./dom.js";
import { fieldRow } from "./field.js";
import { some } from "./format.js";
import { read, set } from "./jsontext.js";

/** Option name to what the text gives; keys may be written with leading dashes. @param {import("./jsontext.js").Node} root */
export function givenOf(root, text) {
  return new Map(root.members.map(({ key, node }) =>
    [key.replace(/^-+/, ""), { key, value: node.value, raw: text.slice(node.start, node.end) }]));
}

/**
 * @param {{groups: {title: string, fields: object[]}[]}} schema
 * @param {import("./environment.js").Environment} environment
 */
export function optionsForm(schema, environment) {
  const rows = new Map();
  const sections = schema.groups.map((group) => section(group));
  const empty = h("p", { class: "empty sheet", hidden: true }, "No option is like that.");
  const total = h("p", { class: "hint", "aria-live": "polite" });
  const search = h("input", { id: freshId("search"), type: "search", placeholder: "Name, meaning or value", oninput: filter });
  const level = choice("Options shown", [["basic", "Basic"], ["all", "All"]]);
  const changed = h("input", { type: "checkbox", onchange: filter });
  const list = h("nav", { class: "sections", "aria-label": "Sections" }, h("ul", { class: "plain" }, sections.map((one) => h("li", {}, one.link))));

  const body = h("div", { class: "form" },
    h("div", { class: "form-bar sheet" },
      h("div", { class: "grow" }, h("label", { for: search.id, class: "visually-hidden" }, "Search the options"), search),
      level.node,
      h("label", { class: "tick" }, changed, "Only what differs from default"),
      total),
    sections.map((one) => one.node), empty);

  function section({ title, fields }) {
    const id = freshId("section");
    const own = fields.map((field) => {
      const row = fieldRow(field, (raw) => write(field.name, raw));
      rows.set(field.name, row);
      return row;
    });
    const tally = h("span", { class: "tally", "aria-hidden": "true" });
    const tallyWords = h("span", { class: "visually-hidden" });
    const heading = h("h3", { id, tabindex: "-1" }, title);
    const link = h("button", {
      type: "button", class: "quiet",
      onclick() {
        heading.scrollIntoView({ block: "start" });
        heading.focus({ preventScroll: true });
      },
    }, h("span", { class: "grow" }, title), tally, tallyWords);
    const node = h("section", { class: "sheet options", "aria-labelledby": id }, heading, own.map((row) => row.node));
    return { title, rows: own, node, link, tally, tallyWords, faults: 0 };
  }

  function choice(label, options) {
    const name = freshId("choice");
    const inputs = options.map(([value], at) => h("input", { type: "radio", name, value, checked: at === 0, onchange: filter }));
    return {
      node: h("div", { class: "choices", role: "radiogroup", "aria-label": label }, options.map(([, text], at) => h("label", {}, inputs[at], text))),
      get value() { return inputs.find((input) => input.checked).value; },
      set value(value) { for (const input of inputs) input.checked = input.value === value; },
    };
  }

  function write(name, raw) {
    const text = environment.text("config");
    const root = read(text);
    const key = givenOf(root, text).get(name)?.key ?? name;
    environment.edit("config", set(text, [key], raw), "form");
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const one of sections) {
      let shown = 0;
      for (const row of one.rows) {
        // A search looks at all options, and what differs or is wrong is never hidden by the basic view.
        const wanted = words.length > 0 || level.value === "all" || row.field.basic || row.differs || row.wrong;
        const visible = wanted && (!changed.checked || row.differs) && row.matches(words);
        row.node.hidden = !visible;
        if (visible) shown += 1;
      }
      count += shown;
      one.node.hidden = shown === 0;
      one.link.parentElement.hidden = shown === 0;
      const different = one.rows.filter((row) => row.differs).length;
      one.tally.textContent = String(one.faults || different || "");
      one.tally.className = one.faults ? "tally badge bad" : different ? "tally badge accent" : "tally";
      const meaning = one.faults ? some(one.faults, "problem") : `${some(different, "option")} not at default`;
      one.tally.title = meaning;
      one.tallyWords.textContent = one.faults || different ? `, ${meaning}` : "";
    }
    empty.hidden = count > 0;
    total.textContent = `${some(count, "option")} of ${rows.size}`;
  }

  /** Show what the text gives. Locked where it is no JSON object. */
  function show(root, text, answer) {
    const given = root === null ? null : givenOf(root, text);
    for (const [name, row] of rows) {
      if (given !== null) row.show(given.get(name), answer?.values?.[name], answer?.origins?.[name]);
      row.lock(given === null);
    }
    filter();
  }

  /** @param {import("./api.js").Problem[]} problems those about options stand beside them */
  function blame(problems) {
    for (const one of sections) {
      one.faults = 0;
      for (const row of one.rows) {
        const own = problems.filter(({ key, document }) => key === row.field.name && (document === "" || document === "config"));
        row.blame(own);
        row.wrong = own.length > 0;
        one.faults += own.length;
      }
    }
    filter();
  }

  /** Bring an option into view. False where there is none of that name. */
  function jump(name) {
    const row = rows.get(name);
    if (row === undefined) return false;
    if (row.node.hidden) {
      search.value = "";
      changed.checked = false;
      filter();
      if (row.node.hidden) level.value = "all";
      filter();
    }
    row.node.scrollIntoView({ block: "center" });
    row.focus();
    return true;
  }

  return { node: body, list, show, blame, jump, names: () => [...rows.keys()] };
}
