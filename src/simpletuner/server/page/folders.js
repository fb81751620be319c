// Choosing a folder among those that the page may see.

import { ApiFault, get, post } from "./api.js";
import { ask, button, dialog, fill, h, icon, problemPanel } from "./dom.js";
import { some } from "./format.js";

/**
 * Let a person walk through the folders that the page may see, starting at `path`.
 * @param {string} path @param {{title: string, yes: string, more: (here: object, open: (where: string) => Promise<void>) => any}} what `more` is what
 *   stands below a folder's own folders
 * @returns {Promise<object|null>} the answer of `GET /api/folders` for the folder that was chosen; null where none was
 */
export async function browse(path, { title, yes, more }) {
  const { roots } = await get("about");
  let here = null;
  let turn = 0;
  const body = h("div", { class: "stack" });

  /** The folder that was asked for last, on its way. */
  let opening = null;
  const open = (where) => (opening = show(where));

  async function show(where, fallback = null) {
    const mine = ++turn;
    try {
      const answer = await get("folders", { path: where });
      if (mine !== turn) return undefined;
      here = answer;
    } catch (error) {
      if (mine !== turn) return undefined;
      if (fallback !== null) return show(fallback);
      here = null;
      body.replaceChildren(problemPanel(error), button("To the start", () => open("."), { icon: "left" }));
      return undefined;
    }
    body.replaceChildren(
      h("div", { class: "row" }, roots.map((root, at) =>
        button(at === 0 ? "Workspace" : root, () => open(at === 0 ? "." : root), { icon: "folder", kind: "tiny" }))),
      h("p", { class: "mono path", "aria-live": "polite" }, here.path),
      h("p", { class: "hint" }, `${some(here.pictures, "picture")}, ${some(here.captions, "caption file")} in it`),
      fill(h("ul", { class: "plain folders" }),
        here.parent === null ? null : h("li", {}, button("Up", () => open(here.parent), { icon: "up", kind: "quiet" })),
        here.folders.map((folder) => h("li", {},
          h("button", { type: "button", class: "quiet", onclick: () => open(folder.path) }, icon("folder"), folder.name))),
        here.folders.length === 0 ? h("li", { class: "dim small" }, "No folders in it") : null),
      h("div", {}, more(here, open)),
    );
    return undefined;
  }

  await show(path === "" ? "." : path, ".");
  const chosen = await dialog({ title, body, actions: [{ label: "Cancel", value: null }, { label: yes, value: "chosen", kind: "primary" }] });
  await opening;  // else a folder that is still on its way when it is chosen gives the one before
  return chosen === null ? null : here;
}

/**
 * Let a person choose a folder, starting at `path`; null where none was chosen.
 * @param {string} path @returns {Promise<string|null>}
 */
export async function chooseFolder(path) {
  async function make(here, open) {
    const name = await ask("Make a folder", { label: `Name, in ${here.path}`, yes: "Make it", check: (text) => (text.trim() ? "" : "A name is missing.") });
    if (name === null) return;
    const made = await post("folder", { path: here.path, name: name.trim() });
    await open(made.path);
  }
  const more = (here, open) => button("Make a folder here", () => make(here, open), { icon: "plus" });
  const chosen = await browse(path, { title: "Choose a folder", yes: "Choose this folder", more });
  return chosen === null ? null : chosen.path;
}

/** Make `path` and the folders above it, where they are not there yet. @throws {ApiFault} it cannot be made */
export async function ensureFolder(path) {
  try {
    await get("folders", { path });
  } catch (error) {
    const at = path.lastIndexOf("/");
    const name = path.slice(at + 1);
    if (!(error instanceof ApiFault) || error.status !== 404 || name === "") throw error;
    const above = at > 0 ? path.slice(0, at) : at === 0 ? "/" : ".";
    if (above !== "." && above !== "/") await ensureFolder(above);
    await post("folder", { path: above, name });
  }
}
