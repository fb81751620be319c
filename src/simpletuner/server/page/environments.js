// Choose, create, rename, delete, export and import environments.

import { address, del, get, post, upload } from "./api.js";
import { ask, button, confirmTyped, dialog, freshId, h, review, toast } from "./dom.js";
import { askBeforeLeaving, go, to } from "./router.js";

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

/** An environment's display name; the unnamed one is the config that `simpletuner train` reads by default. */
export const displayName = (name) => (name === "" ? "(default) config/config.json" : name);

const nameFault = (list) => (text) => {
  if (text === "" && !list.some(({ name }) => name === "")) return "";
  if (!NAME.test(text)) return "Letters, digits, dots, dashes and underscores, at most 64; a letter or digit first.";
  return list.some(({ name }) => name === text) ? "This name is taken." : "";
};

/**
 * The environment select and the buttons beside it.
 * @param {{list: object[], name: string|null, screen: string, verbs: boolean}} options
 */
export function environmentBar({ list, name, screen, verbs }) {
  const id = freshId("environment");
  const select = h("select", { id, onchange: () => { const selected = select.value; select.value = name ?? ""; go(to(screen, selected)); } },
    list.map((one) => h("option", { value: one.name }, displayName(one.name))));
  select.value = name ?? "";
  const bar = h("div", { class: "row environment-bar" }, h("label", { for: id }, "Environment"), select);
  if (!verbs) return bar;
  bar.append(
    button("New", () => make(list, "empty"), { icon: "plus" }),
    button("Copy", () => make(list, "copy", name), { icon: "copy", kind: "quiet" }),
    name === "" ? "" : button("Rename", () => rename(list, name), { icon: "edit", kind: "quiet" }),
    h("a", { class: "button quiet", href: address("environment/export", { name }), download: `${name || "config"}.zip` }, "Export"),
    importButton(list),
    button("Delete", () => remove(name), { icon: "trash", kind: "quiet" }));
  return bar;
}

/** The dialog for a new environment. */
export async function make(list, kind, source = "") {
  const { examples = [] } = await get("about");
  const name = freshId("new");
  const sources = {
    empty: [["", "nothing"]],
    example: examples.map((example) => [example, example]),
    copy: list.map((one) => [one.name, displayName(one.name)]),
  };
  const input = h("input", { id: name, autocomplete: "off", spellcheck: "false", "aria-describedby": `${name}-fault` });
  const kinds = [["empty", "An empty config"], ["example", "A built-in example"], ["copy", "A copy of another"]]
    .filter(([one]) => sources[one].length > 0);
  const starts = h("select", { id: `${name}-kind`, onchange: () => fillSources() }, kinds.map(([one, label]) => h("option", { value: one }, label)));
  const from = h("select", { id: `${name}-from` });
  const fromRow = h("div", {}, h("label", { for: from.id }, "Which"), from);
  const fault = h("p", { class: "fault", id: `${name}-fault`, "aria-live": "polite" });
  const fillSources = () => {
    from.replaceChildren(...sources[starts.value].map(([value, label]) => h("option", { value }, label)));
    fromRow.hidden = starts.value === "empty";
  };
  starts.value = kind;
  fillSources();
  if (kind === "copy") from.value = source ?? "";

  const answer = await dialog({
    title: "New environment",
    body: [h("div", {}, h("label", { for: name }, "Name"), input, fault,
      list.some((one) => one.name === "") ? null : h("p", { class: "hint" }, "Leave it empty for config/config.json, which simpletuner train reads by default.")),
      h("div", {}, h("label", { for: starts.id }, "Start from"), starts), fromRow],
    actions: [{ label: "Cancel", value: null }, { label: "Create", value: "yes", kind: "primary" }],
    opened: (box, close) => review(box, close, input, fault, nameFault(list)),
  });
  if (answer === null) return;
  await post("environments", { name: input.value, kind: starts.value, source: from.value || "" });
  go(to("configure", input.value));
}

async function rename(list, name) {
  const newName = await ask(`Rename ${name}`, { label: "New name", value: name, yes: "Rename", check: nameFault(list) });
  if (newName === null) return;
  await post("environment/rename", { name, new_name: newName });
  askBeforeLeaving(null);
  go(to("configure", newName));
}

async function remove(name) {
  const note = "Its files are deleted: config, dataset list and prompts. Images, caches and runs stay.";
  if (name === "") {
    if (!(await confirmTyped("Delete config/config.json", note, "config.json"))) return;
  } else if (!(await confirmTyped(`Delete ${name}`, note, name))) return;
  await del("environment", { name, confirm: name });
  askBeforeLeaving(null);
  toast(`${displayName(name)} was deleted.`);
  go("#/configure/");
}

/** A button that imports a chosen file; `importFile` imports a dropped one. */
export function importButton(list) {
  const input = h("input", { type: "file", accept: ".zip,.json,.toml", hidden: true, onchange: () => {
    if (input.files.length) importFile(list, input.files[0]);
    input.value = "";
  } });
  return h("span", {}, input, button("Import", () => input.click(), { icon: "upload", kind: "quiet", title: "An exported zip or a config.json. You can also drop it here." }));
}

/** Import an exported zip or a config.json under a name that the user chooses. */
export async function importFile(list, file) {
  const stem = file.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]/g, "-").replace(/^[^A-Za-z0-9]+/, "");
  const free = nameFault(list)(stem) === "" ? stem : "";
  const name = await ask(`Import ${file.name}`, { label: "Name of the new environment", value: free, yes: "Import", check: nameFault(list) });
  if (name === null) return;
  await upload("POST", "environment/import", { name }, file);
  go(to("configure", name));
}
