// One option of a form: its label and key, its input, help on demand, and its problems.

import { button, fill, freshId, h, problemText } from "./dom.js";
import { chooseFolder } from "./folders.js";
import { JsonFault, read } from "./jsontext.js";

const NUMBER = /^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?$/;

/** Render text with code in backquotes. */
const marked = (text) => text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));

/** A value as the form shows it. */
export function shown(value) {
  if (value === null || value === undefined || value.length === 0) return "none";
  if (value === true) return "on";
  if (value === false) return "off";
  if (typeof value === "number") return plainNumber(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}

function plainNumber(value) {
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential();
  return String(value);
}

/**
 * The value of a row's option in the text, and its JSON; undefined if the text does not set it.
 * @typedef {{value: any, raw: string} | undefined} Setting
 */

/**
 * A row of the form.
 * @param {object} field from GET /api/form
 * @param {(raw: string|null) => void} change called with the JSON of a new value, or null for the default
 */
export function fieldRow(field, change) {
  const id = freshId(`field-${field.name}`);
  const fault = h("div", { class: "fault", id: `${id}-fault`, "aria-live": "polite" });
  const origin = h("p", { class: "hint", hidden: true });
  const mark = h("span", { class: "visually-hidden", hidden: true }, "changed");
  const reset = button("", () => { change(null); control.focus(); }, {
    icon: "reset", kind: "quiet tiny", label: `Set ${field.label} to its default`, hidden: true,
  });
  const help = h("div", { class: "help", id: `${id}-help`, hidden: true },
    h("p", {}, marked(field.meaning)), h("p", { class: "hint", id: `${id}-default` }, defaultText(field)));
  const ask = h("button", {
    type: "button", class: "quiet tiny square", "aria-label": `Help on ${field.label}`, title: "Help", "aria-expanded": "false", "aria-controls": help.id,
    onclick() { openHelp(help.hidden); },
  }, "?");
  const describedBy = `${id}-key ${id}-default ${id}-fault`;
  const control = controlFor(field, id, describedBy, change, (text) => { fault.textContent = text; });
  const unit = field.unit ? h("span", { class: "unit" }, field.unit) : null;
  const head = h(control.isGroup ? "span" : "label", control.isGroup ? { id: `${id}-label`, class: "label" } : { for: id }, field.label);

  const node = h("div", { class: "field", dataset: { name: field.name } },
    h("div", { class: "field-name" }, head, h("code", { class: "key", id: `${id}-key` }, field.name),
      field.required ? h("span", { class: "badge" }, "required") : null, mark),
    h("div", { class: "field-input" }, h("div", { class: "row" }, control.node, unit), fault, origin),
    h("div", { class: "field-verbs" }, reset, ask),
    help);

  function openHelp(open) {
    help.hidden = !open;
    ask.setAttribute("aria-expanded", String(open));
  }

  let differs = false;
  return {
    node,
    field,
    focus: () => control.focus(),
    /** Whether the text sets a value other than the default. */
    get differs() { return differs; },
    /** @param {Setting} setting @param {any} [effective] @param {string} [from] */
    show(setting, effective, from) {
      control.show(setting);
      differs = setting !== undefined && !field.required && JSON.stringify(setting.value) !== JSON.stringify(field.default);
      mark.hidden = !differs;
      reset.hidden = setting === undefined || field.required;
      node.classList.toggle("differs", differs);
      origin.hidden = from === undefined || from === "default" || from === "file";
      origin.textContent = origin.hidden ? "" : `Set by ${from === "environment" ? "an environment variable" : from}: ${shown(effective)}`;
    },
    /** @param {import("./api.js").Problem[]} problems */
    showProblems(problems) {
      fault.replaceChildren(...problems.map((one) => h("p", {}, problemText(one))));
      control.invalid(problems.length > 0);
    },
    lock(locked) { control.lock(locked); reset.disabled = locked; },
    matches: (words) => words.every((word) => `${field.label} ${field.name} ${field.meaning} ${control.text()}`.toLowerCase().includes(word)),
  };
}

function defaultText(field) {
  if (field.required) return capital(field.expects);
  const ends = field.expects && field.kind !== "boolean" && field.kind !== "choice" ? ` · ${field.expects}` : "";
  return `Default: ${shown(field.default)}${ends}`;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function controlFor(field, id, describedBy, change, complain) {
  if (field.kind === "boolean") return threeStates(field, id, describedBy, change);
  if (field.kind === "choice") return choices(field, id, describedBy, change);
  if (field.kind === "names") return names(field, id, change);
  if (field.kind === "json") return structure(field, id, describedBy, change, complain);
  return line(field, id, describedBy, change);
}

function threeStates(field, id, describedBy, change) {
  const states = [["", field.required ? "unset" : `Default (${shown(field.default)})`], ["true", "On"], ["false", "Off"]];
  const inputs = states.map(([value]) => h("input", {
    type: "radio", name: id, value, "aria-describedby": describedBy, onchange: () => change(value || null),
  }));
  const node = h("div", { class: "choices", role: "radiogroup", "aria-labelledby": `${id}-label` },
    states.map(([, label], at) => h("label", {}, inputs[at], label)));
  return {
    node,
    isGroup: true,
    focus: () => (inputs.find((input) => input.checked) ?? inputs[0]).focus(),
    show(setting) {
      const text = setting === undefined ? "" : String(setting.value).toLowerCase();
      for (const input of inputs) input.checked = input.value === text;
    },
    text: () => inputs.find((input) => input.checked)?.value ?? "",
    invalid(wrong) { node.classList.toggle("wrong", wrong); },
    lock(locked) { for (const input of inputs) input.disabled = locked; },
  };
}

function choices(field, id, describedBy, change) {
  const select = h("select", { id, "aria-describedby": describedBy, onchange: () => change(select.value === "" ? null : JSON.stringify(select.value)) },
    h("option", { value: "" }, field.required ? "Choose …" : `Default (${shown(field.default)})`),
    field.choices.map((choice) => h("option", { value: choice }, choice)));
  return simple(select, (setting) => {
    const text = setting === undefined ? "" : String(setting.value);
    if (text !== "" && ![...select.options].some((option) => option.value === text)) select.append(h("option", { value: text }, text));
    select.value = text;
  });
}

/** A choice of names from `field.choices`, in the order they are pressed. */
function names(field, id, change) {
  let chosen = [];
  let isLocked = false;
  const node = h("div", { class: "row names", role: "group", "aria-labelledby": `${id}-label` });
  const press = (name) => {
    const next = chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name];
    change(next.length === 0 ? null : JSON.stringify(next));
  };
  const chip = (name) => h("button", {
    type: "button", class: "chip", disabled: isLocked, dataset: { name }, "aria-pressed": String(chosen.includes(name)), onclick: () => press(name),
  }, chosen.length > 1 && chosen.includes(name) ? `${chosen.indexOf(name) + 1}. ${name}` : name);

  function draw() {
    const focused = node.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    const all = [...new Set([...chosen, ...field.choices])];
    node.replaceChildren(...(all.length ? all.map(chip) : [h("span", { class: "dim small" }, "There are no conditioning datasets yet.")]));
    if (focused !== null) node.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
  }

  return {
    node,
    isGroup: true,
    focus: () => node.querySelector("button")?.focus(),
    show(setting) {
      chosen = [setting?.value ?? []].flat().map(String);
      draw();
    },
    text: () => chosen.join(" "),
    invalid(wrong) { node.classList.toggle("wrong", wrong); },
    lock(locked) {
      isLocked = locked;
      draw();
    },
  };
}

/** A JSON value; one of `field.choices` may be typed without quotes. */
function structure(field, id, describedBy, change, complain) {
  const isName = (value) => field.choices.includes(value);
  const area = h("textarea", {
    id, rows: "1", class: "mono", spellcheck: "false", "aria-describedby": describedBy,
    placeholder: field.default === null ? field.choices.join(", ") : JSON.stringify(field.default),
    oninput() {
      const typed = area.value.trim();
      try {
        if (typed !== "" && !isName(typed)) read(area.value);
      } catch (error) {
        if (!(error instanceof JsonFault)) throw error;
        complain(`Line ${error.line}, column ${error.column}: ${error.message}.`);
        area.setAttribute("aria-invalid", "true");
        return;
      }
      complain("");
      area.removeAttribute("aria-invalid");
      change(typed === "" ? null : isName(typed) ? JSON.stringify(typed) : typed);
    },
  });
  return simple(area, (setting) => { area.value = setting === undefined ? "" : isName(setting.value) ? setting.value : setting.raw; });
}

function line(field, id, describedBy, change) {
  const numeric = field.kind === "integer" || field.kind === "number";
  const input = h("input", {
    id, type: "text", autocomplete: "off", spellcheck: "false", "aria-describedby": describedBy,
    inputmode: field.kind === "integer" ? "numeric" : numeric ? "decimal" : null,
    required: field.required,
    placeholder: field.default === null || field.default === undefined ? "" : shown(field.default),
    oninput() {
      const text = numeric ? input.value.trim() : input.value;
      if (text === "") change(null);
      else change(numeric && NUMBER.test(text) ? text : JSON.stringify(text));
    },
  });
  const control = simple(input, (setting) => {
    input.value = setting === undefined ? "" : typeof setting.value === "string" ? setting.value : setting.raw;
  });
  if (field.kind !== "path") return control;
  const pick = button("", async () => {
    const folder = await chooseFolder(input.value);
    if (folder === null) return;
    input.value = folder;
    change(JSON.stringify(folder));
  }, { icon: "folder", label: `Choose a folder for ${field.label}` });
  return {
    ...control,
    node: fill(h("span", { class: "with-button" }), input, pick),
    lock(locked) { control.lock(locked); pick.disabled = locked; },
  };
}

/** A control with one input; it does not overwrite the input while the user types. */
function simple(input, show) {
  let last;
  input.addEventListener("blur", () => {
    if (input.tagName === "INPUT") show(last);
  });
  return {
    node: input,
    isGroup: false,
    focus: () => input.focus(),
    show(setting) {
      last = setting;
      if (document.activeElement !== input || input.tagName === "SELECT") show(setting);
    },
    text: () => input.value,
    invalid(wrong) {
      if (wrong) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    },
    lock(locked) { input.disabled = locked; },
  };
}
