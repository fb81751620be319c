// The pictures of a set: small, with their captions and what training cuts out of them.

import { ApiFault, address, get } from "./api.js";
import { captionBox } from "./caption.js";
import { button, dialog, fill, h, problemPanel } from "./dom.js";
import { count, some } from "./format.js";

const PAGE = 24;

/** What training cuts out of a picture, drawn over it. @param {{resize: number[], crop: number[], target: number[]}} sample */
function cropBox({ resize: [width, height], crop: [left, top], target: [targetWidth, targetHeight] }) {
  return h("span", { class: "crop", "aria-hidden": "true", style: {
    left: `${(left / width) * 100}%`, top: `${(top / height) * 100}%`,
    width: `${(targetWidth / width) * 100}%`, height: `${(targetHeight / height) * 100}%`,
  } });
}

const sizeText = ([width, height]) => `${width}×${height}`;

function cropText({ resize, target }) {
  return sizeText(resize) === sizeText(target) ? `trained at ${sizeText(target)}` : `resized to ${sizeText(resize)}, ${sizeText(target)} cut out`;
}

/**
 * @param {{folder: string, scan: object|null, textFiles: boolean}} what `scan` is the set's part of a scan, where there is one;
 *   `textFiles`: whether the set takes its captions from text files
 */
export function setPictures({ folder, scan, textFiles }) {
  const node = h("div", { class: "stack" }, h("p", { class: "loading" }, "Looking into the folder …"));
  const sight = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      sight.unobserve(entry.target);
      entry.target.dispatchEvent(new CustomEvent("seen"));
    }
  }, { rootMargin: "300px" });

  async function open() {
    if (folder === "") {
      node.replaceChildren(h("p", { class: "dim" }, "Give the set a folder (instance_data_dir) to see its pictures."));
      return;
    }
    let found;
    try {
      found = await get("folders", { path: folder });
    } catch (error) {
      node.replaceChildren(error instanceof ApiFault && error.status === 404
        ? h("p", { class: "dim" }, `${folder} is not there yet. Adding files makes it.`)
        : problemPanel(error));
      return;
    }
    const samples = scan?.samples ?? null;
    const all = samples === null
      ? found.names.map((path) => ({ path, name: path.slice(path.lastIndexOf("/") + 1), sample: null }))
      : samples.map((sample) => ({ path: sample.path, name: sample.name, sample }));
    show(all, found);
  }

  function show(all, found) {
    if (all.length === 0) {
      node.replaceChildren(h("div", { class: "empty" }, h("h3", {}, "No pictures here yet"),
        h("p", {}, found.folders.length ? "There are folders in it: a scan looks into them too." : "Add files, or drop them here.")));
      return;
    }
    let bucket = null;
    let page = 0;
    const area = h("div", {});
    const draw = () => {
      const wanted = bucket === null ? all : all.filter((one) => sizeText(one.sample.target) === bucket);
      const pages = Math.ceil(wanted.length / PAGE);
      page = Math.min(page, pages - 1);
      const part = wanted.slice(page * PAGE, (page + 1) * PAGE);
      const turn = (step) => { page += step; draw(); node.scrollIntoView({ block: "start" }); };
      area.replaceChildren(
        h("ul", { class: "plain pictures" }, part.map((one) => tile(one, wanted))),
        pages > 1 ? h("div", { class: "row pager" },
          button("", () => turn(-1), { icon: "left", label: "Earlier pictures", disabled: page === 0 }),
          h("span", { class: "numbers", "aria-live": "polite" }, `${count(page * PAGE + 1)} to ${count(page * PAGE + part.length)} of ${count(wanted.length)}`),
          button("", () => turn(1), { icon: "right", label: "Later pictures", disabled: page === pages - 1 })) : "");
    };
    const more = found.pictures > all.length && scan === null ? ` The first ${all.length} of ${count(found.pictures)}; a scan shows all.` : "";
    node.replaceChildren();
    fill(node,
      h("p", { class: "hint" }, scan === null
        ? `${some(found.pictures, "picture")}, ${some(found.captions, "caption file")}.${more} Scan to see what training cuts out of them.`
        : "The bright part of a picture is what training sees."),
      textFiles ? null : h("p", { class: "hint" }, "This set does not read caption files (caption_strategy): what is written here is kept for sets that do."),
      scan?.buckets ? buckets(scan.buckets, (wanted) => { bucket = wanted; page = 0; draw(); }) : null,
      area);
    draw();
  }

  function tile(one, all) {
    const caption = captionBox(one.path, one.name);
    const item = h("li", { class: "picture" },
      h("button", { type: "button", class: "frame", "aria-label": `Look at ${one.name}`, onclick: () => look(one, all) }, framed(one, 360)),
      h("p", { class: "small path" }, one.name),
      one.sample === null ? null : h("p", { class: "hint small" }, cropText(one.sample)),
      caption.node);
    item.addEventListener("seen", caption.load, { once: true });
    sight.observe(item);
    return item;
  }

  open();
  return { node, open, close: () => sight.disconnect() };
}

function framed(one, width) {
  const image = h("img", { src: address("picture", { path: one.path, width }), alt: "", loading: "lazy", decoding: "async" });
  const box = h("span", { class: "framed" }, image);
  image.addEventListener("load", () => {
    if (one.sample !== null) box.append(cropBox(one.sample));
  }, { once: true });
  image.addEventListener("error", () => box.replaceChildren(h("span", { class: "dim small" }, "cannot be shown")), { once: true });
  return box;
}

function buckets(list, choose) {
  const chips = [[null, "All"], ...list.map((one) => [`${one.width}×${one.height}`, `${one.width}×${one.height}: ${count(one.pictures)}`])];
  const buttons = chips.map(([value, label], at) => h("button", {
    type: "button", class: "tiny chip", "aria-pressed": String(at === 0),
    onclick(event) {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === event.currentTarget));
      choose(value);
    },
  }, label));
  return h("div", { class: "row", role: "group", "aria-label": "Sizes that are trained" }, buttons);
}

/** A picture large, with the ones before and after it. */
function look(first, all) {
  let at = all.indexOf(first);
  const body = h("div", { class: "stack large" });
  const draw = () => {
    const one = all[at];
    body.replaceChildren(framed(one, 1600),
      h("div", { class: "row" },
        button("", () => step(-1), { icon: "left", label: "The one before", disabled: at === 0 }),
        h("p", { class: "grow small", "aria-live": "polite" }, `${one.name}${one.sample === null ? "" : `, ${cropText(one.sample)}`} (${at + 1} of ${all.length})`),
        button("", () => step(1), { icon: "right", label: "The one after", disabled: at === all.length - 1 })));
  };
  const step = (by) => {
    if (all[at + by] === undefined) return;
    at += by;
    draw();
  };
  draw();
  dialog({
    title: "Picture", body, wide: true, actions: [{ label: "Close", value: null }],
    opened: (box) => box.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    }),
  });
}
