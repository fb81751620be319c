// The reference images of a prompt, in order; added from this computer or from the folders of the page.

import { ApiFault, address, upload } from "./api.js";
import { button, fill, h, toast } from "./dom.js";
import { browse, ensureFolder } from "./folders.js";
import { count } from "./format.js";
import { LIMITS } from "./limits.js";

const MAX_REFERENCES = LIMITS.references.items;
/** Folder in the workspace for files uploaded from this computer. */
const FOLDER = "references";
const THUMBNAIL_PX = 160;

export const fileName = (path) => path.split("/").at(-1);

/** A thumbnail of a reference; its name if it cannot be shown. */
function thumbnail(path) {
  const image = h("img", { src: address("picture", { path, width: THUMBNAIL_PX }), alt: fileName(path), title: path, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(h("div", { class: "missing-picture", title: path }, `cannot be shown: ${fileName(path)}`)), { once: true });
  return image;
}

/** Numbered references, read-only. @param {string[]} paths */
export const shownReferences = (paths) => h("ul", { class: "plain row references", "aria-label": "References" },
  paths.map((path, at) => h("li", {}, h("figure", {}, thumbnail(path), h("figcaption", {}, `${at + 1}`)))));

/** Let the user choose up to `limit` images; returns their paths. @param {number} limit @returns {Promise<string[]>} */
async function chooseImages(limit) {
  const chosen = new Set();
  const tile = (path) => h("li", {}, h("button", {
    type: "button", class: "quiet", "aria-label": fileName(path), title: path, "aria-pressed": String(chosen.has(path)),
    onclick({ currentTarget }) {
      if (!chosen.delete(path) && chosen.size < limit) chosen.add(path);
      currentTarget.setAttribute("aria-pressed", String(chosen.has(path)));
    },
  }, h("img", { src: address("picture", { path, width: THUMBNAIL_PX }), alt: "", loading: "lazy", decoding: "async" }), h("span", { class: "small path" }, fileName(path))));
  const answer = await browse(FOLDER, {
    title: "Choose references", yes: "Choose",
    more: (folder) => [
      folder.names.length < folder.pictures
        ? h("p", { class: "hint" }, `The first ${count(folder.names.length)} of ${count(folder.pictures)} are shown. “Add references” accepts any file.`) : null,
      h("ul", { class: "plain shelf", "aria-label": "Images in the folder" }, folder.names.map(tile)),
    ],
  });
  return answer === null ? [] : [...chosen];
}

/**
 * An editable list of references.
 * @param {(paths: string[]) => void} change called with the new list
 * @param {() => string[]} [present] the list to add uploaded or chosen images to; by default the one shown
 * @returns {{node: HTMLElement, paths: string[], show: (paths: string[]) => void}}
 */
export function referenceList(change, present = null) {
  const node = h("div", { class: "stack tight", role: "group", "aria-label": "References" });
  const input = h("input", { type: "file", multiple: true, hidden: true, accept: "image/*,.avif", "aria-label": "References from this computer", onchange() {
    send([...input.files]);
    input.value = "";
  } });
  const list = { node, paths: [], show };

  const put = (paths) => {
    show(paths);
    change(paths);
  };
  const add = (paths) => {
    const current = present === null ? list.paths : present();
    const free = Math.max(0, MAX_REFERENCES - current.length);
    if (paths.length > free) toast(`A prompt has at most ${MAX_REFERENCES} references: ${paths.length - free} were not added.`, "bad");
    put([...current, ...paths.slice(0, free)]);
  };

  async function send(files) {
    const sent = [];
    try {
      await ensureFolder(FOLDER);
      for (const file of files) {
        const { saved, refused } = await upload("PUT", "upload", { folder: FOLDER, name: file.name }, file);
        sent.push(...saved);
        for (const { name, reason } of refused) toast(`${name}: ${reason}`, "bad");
      }
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      toast(error.message, "bad");
    }
    if (sent.length) add(sent);
  }

  function item(path, at) {
    const others = list.paths.filter((_, index) => index !== at);
    return h("li", {}, h("figure", {}, thumbnail(path), h("figcaption", {}, h("span", { class: "grow" }, `${at + 1}`),
      at === 0 ? null : button("", () => put(others.toSpliced(at - 1, 0, path)), { icon: "left", kind: "quiet tiny", label: `Move reference ${at + 1} to position ${at}` }),
      button("", () => put(others), { icon: "trash", kind: "quiet tiny", label: `Remove reference ${at + 1}` }))));
  }

  function show(paths) {
    list.paths = paths;
    const isFull = paths.length >= MAX_REFERENCES;
    node.replaceChildren();
    fill(node, paths.length ? h("ul", { class: "plain row references" }, paths.map(item)) : null,
      h("div", { class: "row" },
        button("Add references", () => input.click(), { icon: "upload", kind: "tiny", disabled: isFull }), input,
        button("From a folder", async () => {
          const paths = await chooseImages(MAX_REFERENCES - list.paths.length);
          if (paths.length) add(paths);
        }, { icon: "folder", kind: "tiny", disabled: isFull })));
  }

  show([]);
  return list;
}
