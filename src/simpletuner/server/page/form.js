// The form of all options: the essentials open, the other sections folded, and a search over all of them.

import { freshId, h } from "./dom.js";
import { fieldRow } from "./field.js";
import { some } from "./format.js";
import { read, set } from "./jsontext.js";

/** Option name to what the text gives; keys may be written with leading dashes. @param {import("./jsontext.js").Node} root */
export function givenOf(root, text) {
  return new Map(root.members.map(({ key, node }) =>
    [key.replace(/^-+/, ""), { key, value: node.value, raw: text.slice(node.start, node.end) }]));
}

/** The text with option `name` set to the JSON `raw`, or left out where that is null. */
export function withOption(text, name, raw) {
  const key = givenOf(read(text), text).get(name)?.key ?? name;
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
    const home = section(group.title, false);
    for (const field of group.fields) {
      const row = fieldRow(field, (raw) => environment.edit("config", withOption(environment.text("config"), field.name, raw), "form"));
      rows.set(field.name, Object.assign(row, { home, section: null, faults: 0 }));
    }
    return home;
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
      h("label", { class: "tick" }, changed, "Only what is changed"),
      total),
    all.map((one) => one.node), empty);

  function section(title, open) {
    const tally = h("span", { class: "hint" });
    const list = h("div", { class: "rows" });
    return { node: h("details", { class: "sheet options", open }, h("summary", {}, h("h3", {}, title), tally), list), list, tally, wasOpen: open };
  }

  /** Put what differs from its default among the essentials. Not while a person types: rows would move away. */
  function arrange() {
    for (const row of rows.values()) row.section = row.field.basic || row.differs ? essentials : row.home;
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
      const own = rowsOf(one);
      for (const row of own) row.node.hidden = !((!changed.checked || row.differs) && row.matches(words));
      const shown = own.filter((row) => !row.node.hidden).length;
      count += shown;
      one.node.hidden = shown === 0;
      if (isFiltered && !wasFiltered) one.wasOpen = one.node.open;
      if (isFiltered) one.node.open = true;
      else if (wasFiltered) one.node.open = one.wasOpen;
      const faults = own.reduce((sum, row) => sum + row.faults, 0);
      const different = own.filter((row) => row.differs).length;
      one.tally.textContent = [some(shown, "option"), different ? `${different} changed` : "", faults ? some(faults, "problem") : ""].filter(Boolean).join(", ");
      one.tally.classList.toggle("fault", faults > 0);
    }
    empty.hidden = count > 0;
    total.textContent = isFiltered ? `${some(count, "option")} of ${rows.size}` : some(rows.size, "option");
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
    for (const row of rows.values()) {
      const own = problems.filter(({ key, document }) => key === row.field.name && (document === "" || document === "config"));
      row.blame(own);
      if (own.length > row.faults) row.section.node.open = true;
      row.faults = own.length;
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
    }
    row.section.node.open = true;
    row.node.scrollIntoView({ block: "center" });
    row.focus();
    return true;
  }

  return { node, show, arrange, blame, jump };
}
