// Choose a folder among those that the page may access.

import { ApiFault, get, post } from "./api.js";
import { ask, button, dialog, fill, h, icon, problemPanel } from "./dom.js";
import { plural } from "./format.js";

/**
 * Let the user browse the folders of the page, starting at `path`.
 * @param {string} path @param {{title: string, yes: string, more: (folder: object, open: (path: string) => Promise<void>) => any}} options `more`
 *   returns the content below the list of subfolders
 * @returns {Promise<object|null>} the response of `GET /api/folders` for the chosen folder; null if none was chosen
 */
export async function browse(path, { title, yes, more }) {
  const { roots } = await get("about");
  let current = null;
  let lastRequest = 0;
  const body = h("div", { class: "stack" });

  /** The last request for a folder. */
  let opening = null;
  const open = (target) => (opening = show(target));

  async function show(target, fallback = null) {
    const requestNumber = ++lastRequest;
    try {
      const answer = await get("folders", { path: target });
      if (requestNumber !== lastRequest) return undefined;
      current = answer;
    } catch (error) {
      if (requestNumber !== lastRequest) return undefined;
      if (fallback !== null) return show(fallback);
      current = null;
      body.replaceChildren(problemPanel(error), button("Back to the workspace", () => open("."), { icon: "left" }));
      return undefined;
    }
    body.replaceChildren(
      h("div", { class: "row" }, roots.map((root, at) =>
        button(at === 0 ? "Workspace" : root, () => open(at === 0 ? "." : root), { icon: "folder", kind: "tiny" }))),
      h("p", { class: "mono path", "aria-live": "polite" }, current.path),
      h("p", { class: "hint" }, `Contains ${plural(current.pictures, "image")}, ${plural(current.captions, "caption file")}`),
      fill(h("ul", { class: "plain folders" }),
        current.parent === null ? null : h("li", {}, button("Up", () => open(current.parent), { icon: "up", kind: "quiet" })),
        current.folders.map((folder) => h("li", {},
          h("button", { type: "button", class: "quiet", onclick: () => open(folder.path) }, icon("folder"), folder.name))),
        current.folders.length === 0 ? h("li", { class: "dim small" }, "No subfolders") : null),
      h("div", {}, more(current, open)),
    );
    return undefined;
  }

  await show(path === "" ? "." : path, ".");
  const chosen = await dialog({ title, body, actions: [{ label: "Cancel", value: null }, { label: yes, value: "chosen", kind: "primary" }] });
  await opening;  // without this, choosing a folder that is still loading would return the previous one
  return chosen === null ? null : current;
}

/**
 * Let the user choose a folder, starting at `path`; null if none was chosen.
 * @param {string} path @returns {Promise<string|null>}
 */
export async function chooseFolder(path) {
  async function make(parent, open) {
    const name = await ask("New folder", { label: `Name, in ${parent.path}`, yes: "Create", check: (text) => (text.trim() ? "" : "Enter a name.") });
    if (name === null) return;
    const created = await post("folder", { path: parent.path, name: name.trim() });
    await open(created.path);
  }
  const more = (parent, open) => button("New folder here", () => make(parent, open), { icon: "plus" });
  const chosen = await browse(path, { title: "Choose a folder", yes: "Choose this folder", more });
  return chosen === null ? null : chosen.path;
}

/** Create `path` and its parents, if missing. @throws {ApiFault} it cannot be created */
export async function ensureFolder(path) {
  try {
    await get("folders", { path });
  } catch (error) {
    const at = path.lastIndexOf("/");
    const name = path.slice(at + 1);
    if (!(error instanceof ApiFault) || error.status !== 404 || name === "") throw error;
    const parent = at > 0 ? path.slice(0, at) : at === 0 ? "/" : ".";
    if (parent !== "." && parent !== "/") await ensureFolder(parent);
    await post("folder", { path: parent, name });
  }
}
