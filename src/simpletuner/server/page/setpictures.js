// The images of a dataset: filter, select, caption and delete them, with the crop that training uses.

import { ApiFault, address, get, post } from "./api.js";
import { captionBox } from "./caption.js";
import { editCaptions } from "./captionedit.js";
import { pausing } from "./check.js";
import { button, confirm, dialog, fill, freshId, h, problemPanel, toast } from "./dom.js";
import { count, plural } from "./format.js";
import { jobPanel } from "./job.js";
import { Selection } from "./selection.js";

const PAGE = 48;

/** The crop that training uses, drawn over an image. @param {{resize: number[], crop: number[], target: number[]}} sample */
function cropBox({ resize: [width, height], crop: [left, top], target: [targetWidth, targetHeight] }) {
  return h("span", { class: "crop", "aria-hidden": "true", style: {
    left: `${(left / width) * 100}%`, top: `${(top / height) * 100}%`,
    width: `${(targetWidth / width) * 100}%`, height: `${(targetHeight / height) * 100}%`,
  } });
}

const sizeText = ([width, height]) => `${width}×${height}`;

function cropText({ resize, target }) {
  return sizeText(resize) === sizeText(target) ? `trained at ${sizeText(target)}` : `resized to ${sizeText(resize)}, cropped to ${sizeText(target)}`;
}

/** The area that a mask excludes from training (black or transparent), as stripes over an image. */
function maskOver(path, isSegmentation) {
  return h("span", { class: "mask", "aria-hidden": "true" },
    h("img", { src: address("picture", { path, width: 360, mask: true }), alt: "", class: isSegmentation ? "segmentation" : null }));
}

/**
 * @param {{folder: string, scan: object|null, captions: boolean, textFiles: boolean, whole: boolean}} options `scan`: the dataset's part of
 *   a scan, if any; `captions`: whether its images have captions; `textFiles`: whether captions are read from text files; `whole`: whether
 *   a text file is one caption
 */
export function datasetImages({ folder, scan, captions, textFiles, whole }) {
  const node = h("div", { class: "stack" }, h("p", { class: "loading" }, "Loading the folder …"));
  const samples = new Map((scan?.samples ?? []).map((sample) => [sample.name, sample]));
  const rejections = new Map((scan?.rejections ?? []).map((one) => [one.name, one]));
  const selection = new Selection();
  const job = jobPanel();
  /** The folder's response; the names of the shown images; the groups of duplicates, once requested. */
  let listing = null;
  let shownNames = [];
  let groups = null;
  let page = 0;
  let boxes = [];
  let lastRequest = 0;
  /** Reference and mask datasets, each with `partners` once loaded: paths by image name. */
  let conditions = [];

  const visibility = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      visibility.unobserve(entry.target);
      entry.target.dispatchEvent(new CustomEvent("seen"));
    }
  }, { rootMargin: "300px" });

  const id = freshId("images");
  const filter = h("select", { id, onchange: () => { page = 0; open(); } });
  const search = h("input", { id: `${id}-search`, type: "search", autocomplete: "off", oninput: () => { page = 0; look.later(); } });
  const masked = h("input", { type: "checkbox", checked: true, onchange: () => area.classList.toggle("unmasked", !masked.checked) });
  const masks = h("label", { class: "tick", hidden: true }, masked, "Masks over the images");
  const look = pausing(250, () => open());
  const area = h("div", {});
  const number = h("p", { class: "grow numbers", "aria-live": "polite" });
  const copiesButton = button("Select all but the first of each", () => selection.set(groups.flatMap((group) => group.names.slice(1))), { kind: "quiet" });
  const all = button("Select all", () => selection.all(), { kind: "quiet", "aria-keyshortcuts": "Control+A" });
  const none = button("Clear", () => selection.set([]), { kind: "quiet" });
  const edit = button("Edit captions", change, { icon: "edit" });
  const deleteButton = button("Delete", remove, { icon: "trash", kind: "danger" });
  const undoTools = h("div", { class: "row" });
  const facts = h("p", { class: "hint" });
  selection.attach(area);
  selection.addEventListener("change", showVerbs);

  const path = (name) => (listing.path === "." ? name : `${listing.path}/${name}`);

  async function open() {
    const requestNumber = ++lastRequest;
    if (folder === "") {
      node.replaceChildren(h("p", { class: "dim" }, "Set the dataset's folder (instance_data_dir) to see its images."));
      return;
    }
    try {
      if (filter.value === "duplicates" && groups === null) groups = (await job.run("duplicates", "Comparing images", { folder }))?.groups ?? [];
      const [answer] = await Promise.all([
        get("images", { folder, missing: filter.value === "missing", text: search.value.trim() }), ...conditions.map(findPartners),
      ]);
      if (requestNumber !== lastRequest) return;
      listing = answer;
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      if (area.isConnected && error.status !== 404) {
        // Keep the shown images, and what is being typed, while the server does not answer.
        toast(error.message, "bad");
        return;
      }
      node.replaceChildren(error.status === 404
        ? h("p", { class: "dim" }, `${folder} does not exist yet. Adding files creates it.`)
        : problemPanel(error));
      return;
    }
    if (listing.total === 0 && listing.trashed === 0) {
      node.replaceChildren(h("div", { class: "empty" }, h("h3", {}, "No images here yet"), h("p", {}, "Add files or a folder, or drop them here.")));
      return;
    }
    if (!area.isConnected) {
      node.replaceChildren();
      fill(node, facts,
        textFiles || !captions ? null : h("p", { class: "hint" }, "This dataset does not read caption files (caption_strategy): captions written here are used by datasets that do."),
        h("div", { class: "row image-filter" },
          h("div", {}, h("label", { for: id }, "Show"), filter),
          h("div", { class: "grow" }, h("label", { for: search.id }, captions ? "Name or caption contains" : "Name contains"), search), masks),
        h("div", { class: "row picked" }, number, copiesButton, all, none, edit, deleteButton), job.node, undoTools, area);
    }
    showFilter();
    facts.textContent = factsText();
    shownNames = filteredNames(filter.value);
    selection.offer(shownNames);
    showUndoTools();
    draw();
  }

  function factsText() {
    if (!captions) return `${plural(listing.total, "image")}. Each belongs to the image of the same name, in the datasets that list this one in conditioning_data.`;
    const captioned = listing.without_caption ? `${count(listing.without_caption)} without a caption` : "each with a caption";
    const cropHint = scan === null ? "Scan to see the crops that training uses." : "Training uses the bright part of an image.";
    return `${plural(listing.total, "image")}, ${captioned}. ${cropHint}${masks.hidden ? "" : " Stripes mark where a mask is black or transparent."}`;
  }

  /** Load the images' partners in one reference or mask dataset; an unreadable dataset has none. */
  async function findPartners(condition) {
    try {
      const { path: partnerFolder, names } = await get("images/partners", { folder, beside: condition.folder, numbered: condition.isReference });
      condition.path = partnerFolder;
      condition.partners = new Map(Object.entries(names).map(([name, files]) => [name, files.map((file) => `${partnerFolder}/${file}`)]));
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      condition.partners = new Map();
    }
  }

  const mask = (name) => conditions.find((one) => !one.isReference && one.partners?.has(name));
  const lacks = (name) => conditions.some((one) => one.partners && !one.partners.has(name));

  /** References and mask of an image at `width` pixels, and the missing ones. */
  function partnersOf(name, width) {
    let number = 0;
    return conditions.filter(({ partners }) => partners).map((condition) => {
      const paths = condition.partners.get(name);
      if (paths === undefined) return h("li", { class: "small dim" }, `none in ${condition.id}`);
      return paths.map((path) => {
        const partnerText = condition.isReference ? `Reference ${(number += 1)}` : "Mask";
        return h("li", {}, h("figure", {}, h("img", { src: address("picture", { path, width, mask: condition.isReference ? null : true }), alt: `${partnerText} of ${name}`, title: path, loading: "lazy", decoding: "async" }),
          h("figcaption", { class: "small dim" }, partnerText)));
      });
    });
  }

  /** The names that pass the filter. */
  function filteredNames(value) {
    const { names } = listing;
    if (value === "duplicates") {
      const listed = new Set(names);
      return groups.flatMap((group) => group.names).filter((name) => listed.has(name));
    }
    if (value === "partner") return names.filter(lacks);
    if (value.startsWith("size ")) return names.filter((name) => samples.has(name) && sizeText(samples.get(name).target) === value.slice(5));
    if (value.startsWith("left ")) return names.filter((name) => rejections.get(name)?.reason === value.slice(5));
    return names;
  }

  function showFilter() {
    const current = filter.value || "all";
    const option = ([value, label]) => h("option", { value }, label);
    const sizes = (scan?.buckets ?? []).map(({ width, height, pictures }) => [`size ${width}×${height}`, `${width}×${height} (${count(pictures)})`]);
    const reasons = Object.keys(scan?.rejected ?? {}).map((reason) => [`left ${reason}`, reason]);
    filter.replaceChildren();
    masks.hidden = conditions.every(({ isReference, partners }) => isReference || !partners?.size);
    fill(filter, option(["all", "All images"]),
      captions ? option(["missing", `Without a caption (${count(listing.without_caption)})`]) : null,
      conditions.length ? option(["partner", "Without a reference or mask"]) : null,
      option(["duplicates", "Duplicates"]),
      reasons.length ? h("optgroup", { label: "Left out of training" }, reasons.map(option)) : null,
      sizes.length > 1 ? h("optgroup", { label: "Trained at" }, sizes.map(option)) : null);
    filter.value = [...filter.options].some(({ value }) => value === current) ? current : "all";
  }

  function showVerbs() {
    const chosen = selection.size;
    number.textContent = chosen === 0 ? plural(shownNames.length, "image") : `${count(chosen)} of ${plural(shownNames.length, "image")} selected`;
    copiesButton.hidden = filter.value !== "duplicates" || shownNames.length === 0;
    all.disabled = chosen === shownNames.length;
    none.disabled = deleteButton.disabled = chosen === 0;
    edit.lastElementChild.textContent = chosen === 0 ? "Edit all captions" : "Edit captions";
    edit.disabled = shownNames.length === 0;
    edit.hidden = !captions;
  }

  function showUndoTools() {
    undoTools.replaceChildren();
    fill(undoTools,
      listing.can_undo && captions ? button("Undo the last caption edit", () => undoLast("captions"), { icon: "reset", kind: "tiny" }) : null,
      listing.trashed ? [h("span", { class: "small dim" }, `${plural(listing.trashed, "deleted file")} in the trash.`),
        button("Undo the last deletion", () => undoLast("delete"), { icon: "reset", kind: "tiny" }), button("Empty the trash", emptyTrash, { kind: "tiny" })] : null);
    undoTools.hidden = undoTools.childElementCount === 0;
  }

  async function change() {
    const names = selection.size > 0 ? selection.names : shownNames.length === listing.total ? null : shownNames;
    let result;
    try {
      result = await editCaptions({ folder, names, total: shownNames.length, whole });
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      toast(error.message, "bad");
      return;
    }
    if (result === null) return;
    toast(`${plural(result.changed, "caption")} changed${result.left_out.length ? `, ${count(result.left_out.length)} not changed` : ""}.`, "good");
    await open();
  }

  async function remove() {
    const { names } = selection;
    const captioned = names.length - names.filter((name) => listing.missing.includes(name)).length;
    const files = `${plural(names.length, "image")}${captioned ? ` and ${captioned === 1 && names.length === 1 ? "its caption" : plural(captioned, "caption")}` : ""}`;
    const partners = deletablePartners(names);
    const ofPartners = (number) => plural(number, "reference or mask", "references and masks");
    const withPartners = h("input", { type: "checkbox" });
    const answer = await dialog({
      title: `Delete ${files}?`,
      body: [
        h("p", {}, `They are moved to ${path(".simpletuner/trash")}: you can undo this until you empty the trash.`),
        partners.files ? h("label", { class: "tick" }, withPartners, `Also delete ${ofPartners(partners.files)} of ${names.length === 1 ? "this image" : "these images"}; to undo that, open ${partners.ids.length === 1 ? "the dataset" : "the datasets"} ${partners.ids.join(", ")}`) : null,
      ],
      actions: [{ label: "Cancel", value: false }, { label: `Delete ${plural(names.length, "image")}`, value: true, kind: "danger" }],
    });
    if (answer !== true) return;
    const result = await post("images/delete", { folder, names, partners: withPartners.checked ? partners.folders : [] });
    toast(`${plural(result.images, "image")} deleted${result.partners ? ` with ${ofPartners(result.partners)}` : ""}${result.left_out.length ? `, ${count(result.left_out.length)} not deleted: ${result.left_out[0].detail}` : ""}.`, "good");
    selection.set([]);
    groups = null;
    await open();
  }

  /** The references and masks that belong to images `names` and to no other: their number, folders and datasets. */
  function deletablePartners(names) {
    const deleted = new Set(names);
    const found = new Map();
    for (const { id: dataset, folder: beside, path: partnerFolder, partners } of conditions) {
      if (!partners || partnerFolder === listing.path) continue;
      const kept = new Set([...partners].flatMap(([name, paths]) => (deleted.has(name) ? [] : paths)));
      const paths = [...partners].flatMap(([name, files]) => (deleted.has(name) ? files : [])).filter((file) => !kept.has(file));
      if (paths.length) found.set(partnerFolder, { beside, dataset, paths });
    }
    const each = [...found.values()];
    return { files: new Set(each.flatMap(({ paths }) => paths)).size, folders: each.map(({ beside }) => beside), ids: each.map(({ dataset }) => dataset) };
  }

  async function undoLast(what) {
    const { undone, remaining, left_out: skipped } = await post("images/undo", { folder, what });
    const earlier = what === "delete" ? remaining - skipped.length : 0;
    toast(`${plural(undone, "file")} restored${skipped.length ? `; ${skipped.length} not restored: ${skipped[0].name} ${skipped[0].reason}` : ""}${earlier ? `; ${plural(earlier, "file")} of earlier deletions left in the trash` : ""}.`, undone ? "good" : "bad");
    groups = null;
    await open();
  }

  async function emptyTrash() {
    if (!(await confirm("Empty the trash?", `${plural(listing.trashed, "file")} that you deleted from ${folder} cannot be restored afterwards.`, "Empty the trash", "danger"))) return;
    await post("images/empty-trash", { folder });
    await open();
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(shownNames.length / PAGE));
    page = Math.min(page, pages - 1);
    const part = shownNames.slice(page * PAGE, (page + 1) * PAGE);
    const turnTo = (to) => { page = Math.max(0, Math.min(pages - 1, to)); draw(); node.scrollIntoView({ block: "start" }); };
    for (const box of boxes) box.close();
    boxes = [];
    area.replaceChildren();
    fill(area,
      shownNames.length === 0 ? h("p", { class: "dim" }, filter.value === "duplicates" ? "There are no duplicates." : "No image matches.") : null,
      h("ul", { class: "plain pictures", "aria-label": "Images" }, part.map((name, at) => [heading(name, part[at - 1]), tile(name)])),
      pages > 1 ? h("div", { class: "row pager" },
        button("", () => turnTo(page - 1), { icon: "left", label: "Earlier images", disabled: page === 0 }),
        h("label", { for: `${id}-page` }, "Page"),
        h("input", { id: `${id}-page`, type: "number", min: 1, max: pages, value: String(page + 1), onchange: (event) => turnTo(Number(event.target.value) - 1 || 0) }),
        h("span", { class: "numbers", "aria-live": "polite" }, `of ${count(pages)}: ${count(page * PAGE + 1)} to ${count(page * PAGE + part.length)} of ${count(shownNames.length)}`),
        button("", () => turnTo(page + 1), { icon: "right", label: "Later images", disabled: page === pages - 1 })) : null);
    showVerbs();
  }

  /** The heading of a group of duplicates, before its first image. */
  function heading(name, previous) {
    if (filter.value !== "duplicates") return null;
    const group = groups.find(({ names }) => names.includes(name));
    if (previous !== undefined && group.names.includes(previous)) return null;
    return h("li", { class: "group-head" }, h("h3", {}, group.kind === "exact" ? "Identical files" : "Nearly identical"),
      group.kind === "exact" ? null : h("span", { class: "hint" }, "Their thumbnails look alike. Compare the images before you delete one."));
  }

  function tile(name) {
    const sample = samples.get(name) ?? null;
    const rejection = rejections.get(name);
    const caption = captions ? captionBox(path(name), name) : null;
    if (caption) boxes.push({ ...caption, path: path(name) });
    const touch = (event) => {
      if (event.shiftKey) selection.extend(name);
      else if (event.ctrlKey || event.metaKey) selection.toggle(name);
      else large(name);
    };
    const item = h("li", { class: "picture" },
      h("div", { class: "tile" }, h("button", { type: "button", class: "frame", "aria-label": `Enlarge ${name}`, onclick: touch }, framed(name, 360)), selection.box(name)),
      h("p", { class: "small path" }, name),
      sample === null ? null : h("p", { class: "hint small" }, cropText(sample)),
      rejection ? h("p", { class: "fault" }, `Left out: ${rejection.reason}. ${rejection.detail}`) : null,
      conditions.length ? fill(h("ul", { class: "plain row partners" }), partnersOf(name, 160)) : null,
      caption?.node);
    if (caption === null) return item;
    item.addEventListener("seen", caption.load, { once: true });
    visibility.observe(item);
    return item;
  }

  function framed(name, width) {
    const image = h("img", { src: address("picture", { path: path(name), width }), alt: "", loading: "lazy", decoding: "async" });
    const box = h("span", { class: "framed" }, image);
    image.addEventListener("load", () => {
      const maskSet = mask(name);
      if (maskSet) box.append(maskOver(maskSet.partners.get(name)[0], maskSet.kind === "segmentation"));
      if (samples.has(name)) box.append(cropBox(samples.get(name)));
    }, { once: true });
    image.addEventListener("error", () => box.replaceChildren(h("span", { class: "dim small" }, "cannot be shown")), { once: true });
    return box;
  }

  /** Show an image enlarged, with buttons to the previous and next one. */
  function large(first) {
    let at = shownNames.indexOf(first);
    const body = h("div", { class: "stack large" });
    const show = () => {
      const name = shownNames[at];
      body.classList.toggle("unmasked", !masked.checked);
      body.replaceChildren(fill(h("div", { class: "beside-partners" }), framed(name, 1600),
        conditions.length ? fill(h("ul", { class: "plain partners" }), partnersOf(name, 640)) : null),
        h("div", { class: "row" },
          button("", () => step(-1), { icon: "left", label: "Previous image", disabled: at === 0 }),
          h("p", { class: "grow small", "aria-live": "polite" }, `${name}${samples.has(name) ? `, ${cropText(samples.get(name))}` : ""} (${count(at + 1)} of ${count(shownNames.length)})`),
          button("", () => step(1), { icon: "right", label: "Next image", disabled: at === shownNames.length - 1 })));
    };
    const step = (by) => {
      if (shownNames[at + by] === undefined) return;
      at += by;
      show();
    };
    show();
    dialog({
      title: "Image", body, wide: true, actions: [{ label: "Close", value: null }],
      opened: (box) => box.addEventListener("keydown", (event) => {
        if (event.key === "ArrowLeft") step(-1);
        if (event.key === "ArrowRight") step(1);
      }),
    });
  }

  open();
  return {
    node,
    open() {
      groups = null;
      return open();
    },
    /** Show the partners of the images in reference and mask datasets. @param {{id: string, folder: string, kind: string, isReference: boolean}[]} newConditions */
    pair(newConditions) {
      const keyOf = (one) => JSON.stringify([one.id, one.folder, one.kind]);
      if (newConditions.map(keyOf).join() === conditions.map(keyOf).join()) return undefined;
      conditions = newConditions;
      return open();
    },
    /** Paths of the images whose captions are shown. */
    get shown() {
      return new Set(boxes.map((box) => box.path));
    },
    close() {
      for (const box of boxes) box.close();
      visibility.disconnect();
      look.stop();
      job.close();
    },
  };
}
