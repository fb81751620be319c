// The form of all options: essentials open, other sections folded, with a search over all of them.

import { freshId, h } from "./dom.js";
import { fieldRow } from "./field.js";
import { plural } from "./format.js";
import { read, set } from "./jsontext.js";

/** The options that the text sets, by name; keys may have leading dashes. @param {import("./jsontext.js").Node} root */
export function optionsIn(root, text) {
  return new Map(root.members.map(({ key, node }) =>
    [key.replace(/^-+/, ""), { key, value: node.value, raw: text.slice(node.start, node.end) }]));
}

/** Return the text with option `name` set to the JSON `raw`, or removed if `raw` is null. */
export function withOption(text, name, raw) {
  const key = optionsIn(read(text), text).get(name)?.key ?? name;
  return set(text, [key], raw);
}

/**
 * @param {{groups: {title: string, fields: object[]}[]}} schema
 * @param {import("./environment.js").Environment} environment
 */
export function optionsForm(schema, environment) {
  const essentials = section("Essentials", true);
  const rows = new Map();
  const sections = schema.groups.map((group) => {
    const groupSection = section(group.title, false);
    for (const field of group.fields) {
      const row = fieldRow(field, (raw) => environment.edit("config", withOption(environment.text("config"), field.name, raw), "form"));
      rows.set(field.name, Object.assign(row, { groupSection, section: null, faults: 0 }));
    }
    return groupSection;
  });
  const all = [essentials, ...sections];
  const empty = h("p", { class: "empty sheet", hidden: true }, "No option matches.");
  const total = h("p", { class: "hint", "aria-live": "polite" });
  const search = h("input", { id: freshId("search"), type: "search", placeholder: "Search names, keys and help", oninput: filter });
  const changed = h("input", { type: "checkbox", onchange: filter });
  let isFiltered = false;

  const node = h("section", { class: "form", "aria-label": "Options" },
    h("div", { class: "form-bar sheet" },
      h("div", { class: "grow" }, h("label", { for: search.id, class: "visually-hidden" }, "Search the options"), search),
      h("label", { class: "tick" }, changed, "Changed options only"),
      total),
    all.map((one) => one.node), empty);

  function section(title, open) {
    const tally = h("span", { class: "hint" });
    const list = h("div", { class: "rows" });
    return { node: h("details", { class: "sheet options", open }, h("summary", {}, h("h3", {}, title), tally), list), list, tally, wasOpen: open };
  }

  /** Move options that differ from their defaults to the essentials. Not called while the user types, since rows would jump. */
  function arrange() {
    for (const row of rows.values()) row.section = row.field.basic || row.differs ? essentials : row.groupSection;
    for (const one of all) one.list.replaceChildren(...rowsOf(one).map((row) => row.node));
    filter();
  }

  const rowsOf = (one) => [...rows.values()].filter((row) => row.section === one);

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wasFiltered = isFiltered;
    isFiltered = words.length > 0 || changed.checked;
    let count = 0;
    for (const one of all) {
      const sectionRows = rowsOf(one);
      for (const row of sectionRows) row.node.hidden = !((!changed.checked || row.differs) && row.matches(words));
      const shown = sectionRows.filter((row) => !row.node.hidden).length;
      count += shown;
      one.node.hidden = shown === 0;
      if (isFiltered && !wasFiltered) one.wasOpen = one.node.open;
      if (isFiltered) one.node.open = true;
      else if (wasFiltered) one.node.open = one.wasOpen;
      const faults = sectionRows.reduce((sum, row) => sum + row.faults, 0);
      const different = sectionRows.filter((row) => row.differs).length;
      one.tally.textContent = [plural(shown, "option"), different ? `${different} changed` : "", faults ? plural(faults, "problem") : ""].filter(Boolean).join(", ");
      one.tally.classList.toggle("fault", faults > 0);
    }
    empty.hidden = count > 0;
    total.textContent = isFiltered ? `${plural(count, "option")} of ${rows.size}` : plural(rows.size, "option");
  }

  /** Show the options in the text; lock the form if the text is not a JSON object. */
  function show(root, text, answer) {
    const textOptions = root === null ? null : optionsIn(root, text);
    for (const [name, row] of rows) {
      if (textOptions !== null) row.show(textOptions.get(name), answer?.values?.[name], answer?.origins?.[name]);
      row.lock(textOptions === null);
    }
    filter();
  }

  /** @param {import("./api.js").Problem[]} problems those about options are shown beside them */
  function showProblems(problems) {
    for (const row of rows.values()) {
      const ofRow = problems.filter(({ key, document }) => key === row.field.name && (document === "" || document === "config"));
      row.showProblems(ofRow);
      if (ofRow.length > row.faults) row.section.node.open = true;
      row.faults = ofRow.length;
    }
    filter();
  }

  /** Scroll to an option and focus it. Returns false if there is no such option. */
  function jump(name) {
    const row = rows.get(name);
    if (row === undefined) return false;
    if (row.node.hidden) {
      search.value = "";
      changed.checked = false;
      filter();
    }
    row.section.node.open = true;
    row.node.scrollIntoView({ block: "center" });
    row.focus();
    return true;
  }

  return { node, show, arrange, showProblems, jump };
}
