// Build elements, icons, dialogs and toasts.

import { ApiFault, problem } from "./api.js";

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "indeterminate", "readOnly", "open"]);

/**
 * Create an element. Properties: `class`, `style` (an object), `dataset`, `on…` (listeners); null, undefined and false are skipped.
 * Children: nodes and text; null, undefined and false are skipped, arrays are flattened.
 * @param {string} tag @param {object} props @param {...any} children @returns {HTMLElement}
 */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props ?? {})) {
    if (key === "style") Object.assign(node.style, value);
    else if (key === "dataset") Object.assign(node.dataset, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2).toLowerCase(), value);
    else if (PROPERTIES.has(key)) node[key] = value ?? false;
    else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(key, value === true ? "" : String(value));
    }
  }
  fill(node, ...children);
  return node;
}

/** Append children to a node. */
export function fill(node, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

let serial = 0;

/** An id that is unique on the page. */
export const freshId = (stem = "x") => `${stem}-${++serial}`;

const PATHS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v6M14 11v6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  play: "M7 4.5v15L19 12z",
  stop: "M6 6h12v12H6z",
  save: "M5 4h11l3 3v13H5zM8 4v5h7V4M8 20v-6h8v6",
  check: "M5 12.5l4.5 4.5L19 7",
  search: "M10.5 4a6.5 6.5 0 100 13 6.5 6.5 0 000-13zM15.5 15.5L21 21",
  folder: "M3 6h6l2 2.5h10V19H3z",
  file: "M6 3h8l4 4v14H6zM14 3v4h4",
  upload: "M12 16V4M7 9l5-5 5 5M4 20h16",
  download: "M12 4v12M7 11l5 5 5-5M4 20h16",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  reset: "M4 9h10a5 5 0 010 10H8M4 9l4-4M4 9l4 4",
  up: "M12 19V6M6 11l6-6 6 6",
  down: "M12 5v13M6 13l6 6 6-6",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  refresh: "M20 11a8 8 0 10-2.3 6.3M20 4v7h-7",
  queue: "M4 6h16M4 12h16M4 18h10",
  picture: "M3 5h18v14H3zM3 16l5-5 4 4 3-3 6 5M15.5 9a1 1 0 100 .1",
  eye: "M2 12s4-7 10-7 10 7 10 7-4 7-10 7S2 12 2 12zM12 9a3 3 0 100 6 3 3 0 000-6z",
  chart: "M4 4v16h16M7 15l4-5 3 3 5-7",
};

/** A line icon of 24 × 24 units, hidden from screen readers, which read the text or label beside it. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/**
 * A button. Options: `icon`, `kind` (primary, quiet, danger), `label` (if it shows no text), and properties of `h`.
 * While its action runs, it is marked as busy and ignores further presses.
 */
export function button(text, onclick, { icon: name, kind = "", label, ...props } = {}) {
  const classes = [kind, text ? "" : "square", props.class ?? ""].filter(Boolean).join(" ");
  const press = async (event) => {
    if (node.ariaBusy === "true") return;
    const work = onclick(event);
    if (!(work instanceof Promise)) return;
    node.ariaBusy = "true";
    try {
      await work;
    } finally {
      node.ariaBusy = null;
    }
  };
  const node = h(
    "button",
    { type: "button", "aria-label": label, title: label, ...props, class: classes, onclick: press },
    name ? icon(name) : null,
    text ? h("span", {}, text) : null,
  );
  return node;
}

/** A message that disappears after six seconds. Kinds: "", good, bad; bad ones stay until they are closed. */
export function toast(text, kind = "") {
  const area = document.getElementById("toasts");
  const node = h(
    "div",
    { class: `toast ${kind}`, role: kind === "bad" ? "alert" : "status" },
    h("p", {}, text),
    button("", () => node.remove(), { icon: "close", kind: "quiet", label: "Close this message" }),
  );
  area.append(node);
  while (area.children.length > 5) area.firstElementChild.remove();
  if (kind !== "bad") setTimeout(() => node.remove(), 6000);
  return node;
}

/**
 * Show a modal dialog.
 * @param {{title: string, body: any, actions: {label: string, value: any, kind?: string, disabled?: boolean}[], wide?: boolean,
 *   opened?: (dialog: HTMLDialogElement, close: (value: any) => void) => void}} options
 * @returns {Promise<any>} the value of the pressed action, or null if the dialog was closed
 */
export function dialog({ title, body, actions, wide = false, opened = () => {} }) {
  return new Promise((resolve) => {
    const heading = freshId("dialog");
    let result = null;
    const close = (value) => {
      result = value;
      box.close();
    };
    const buttons = actions.map(({ label, value, kind = "", disabled = false }) =>
      h("button", { type: "button", class: kind, disabled, dataset: { action: String(value) }, onclick: () => close(value) }, label));
    const box = h(
      "dialog",
      { "aria-labelledby": heading, class: wide ? "wide" : "", onclose: () => { box.remove(); resolve(result); } },
      h("h2", { id: heading }, title),
      h("div", { class: "dialog-body" }, body),
      h("div", { class: "actions" }, buttons),
    );
    document.body.append(box);
    box.showModal();
    opened(box, close);
  });
}

/** Ask yes or no. */
export async function confirm(title, text, yes, kind = "primary") {
  return (await dialog({
    title, body: h("p", {}, text),
    actions: [{ label: "Cancel", value: false }, { label: yes, value: true, kind }],
  })) === true;
}

/** Ask for a line of text; `check` returns a fault, or "". Returns null if the dialog was closed. */
export function ask(title, { label, value = "", yes = "OK", kind = "primary", note = "", check = () => "" }) {
  const id = freshId("ask");
  const input = h("input", { id, value, autocomplete: "off", spellcheck: "false", "aria-describedby": `${id}-fault` });
  const fault = h("p", { class: "fault", id: `${id}-fault`, "aria-live": "polite" });
  return dialog({
    title,
    body: [note ? h("p", {}, note) : null, h("label", { for: id }, label), input, fault],
    actions: [{ label: "Cancel", value: null }, { label: yes, value: "yes", kind }],
    opened(box, close) {
      review(box, close, input, fault, check);
      input.select();
    },
  }).then((answer) => (answer === "yes" ? input.value : null));
}

/** Disable the action "yes" of an open dialog while `check` finds a fault in its line of text; Enter presses it. */
export function review(box, close, input, fault, check) {
  const accept = box.querySelector('[data-action="yes"]');
  const update = () => {
    const inputFault = check(input.value);
    fault.textContent = input.value === "" ? "" : inputFault;
    accept.disabled = inputFault !== "";
  };
  input.addEventListener("input", update);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !accept.disabled) close("yes");
  });
  update();
  input.focus();
}

/** Ask the user to type `word` before an irreversible action. */
export const confirmTyped = async (title, note, word, yes = "Delete") =>
  (await ask(title, {
    label: `Type ${word} to confirm`, yes, kind: "danger", note, check: (text) => (text === word ? "" : `This is not ${word}.`),
  })) !== null;

/** The problems in any thrown error. */
export function problemsOf(error) {
  if (error instanceof ApiFault) return error.problems;
  return [problem(`The page failed: ${error?.message ?? error}`, "Reload it; if that does not help, please report it.")];
}

/** A problem's found, expected and remedy, as elements. */
export function problemText(one) {
  return [
    h("strong", {}, one.found || one.text),
    one.expected ? h("span", { class: "expected" }, ` Expected: ${one.expected}.`) : null,
    one.remedy ? h("span", { class: "remedy" }, ` ${one.remedy}`) : null,
  ];
}

/** A panel of problems, which screen readers announce at once. */
export function problemPanel(error) {
  return h("div", { class: "panel bad", role: "alert" },
    h("ul", { class: "problems" }, problemsOf(error).map((one) => h("li", {}, problemText(one)))));
}
