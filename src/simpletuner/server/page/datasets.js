// The screen that edits the list of datasets and shows their images.

import { ApiFault, get, post } from "./api.js";
import { unsavedCaptions } from "./caption.js";
import { drafts } from "./captiondrafts.js";
import { checked, pausing, summary } from "./check.js";
import { ask, button, confirm, dialog, fill, freshId, h } from "./dom.js";
import { editing } from "./editing.js";
import { Environment } from "./environment.js";
import { environmentBar } from "./environments.js";
import { chooseFolder } from "./folders.js";
import { plural } from "./format.js";
import { jobPanel } from "./job.js";
import { move, set, indentedJson } from "./jsontext.js";
import { examined, rawEditor } from "./raw.js";
import { go, to } from "./router.js";
import { scanSummary } from "./scanned.js";
import { CONDITIONS, isReference, kindOf, kindText, datasetForm } from "./setform.js";
import { datasetImages } from "./setpictures.js";
import { droppable, folderButton, uploads } from "./uploads.js";

/** A dropped folder that waits for its environment to be created. */
let pendingFolder = null;

/** Show the dataset list of environment `params.name`. */
export async function datasets(root, { name }) {
  const [list, schema] = await Promise.all([get("environments"), get("form")]);
  if (!list.some((one) => one.name === name)) {
    nothing(root, list, name);
    return () => {};
  }
  const environment = await Environment.open(name);
  const edit = editing(environment);
  const job = jobPanel();
  const problems = summary(jump);
  const raw = rawEditor(environment, "datasets", { kind: "array", label: "The list as JSON", rows: 18 });
  let answer = { problems: [], notices: [] };
  /** The last scan's result, by dataset id. */
  let scans = new Map();
  let chosen = 0;
  let form = null;
  let pictures = null;
  /** Upload controls by folder: an upload continues while another dataset is shown. */
  const uploadsByFolder = new Map();
  const unsaved = unsavedCaptions(() => pictures?.shown ?? new Set());

  const side = h("nav", { class: "stack sets", "aria-label": "Entries of the list" });
  const detail = h("div", { class: "stack detail" });
  const text = () => environment.text("datasets");
  const entries = () => examined(text(), "array").root?.value ?? null;
  const change = (newText) => environment.edit("datasets", newText, "list");

  const check = pausing(400, async (signal) => {
    answer = await checked(environment.draft(), signal);
    problems.show({ problems: answer.problems.filter((one) => one.document === "datasets"), notices: answer.notices });
    showProblems();
  });

  function showProblems() {
    const entry = entries()?.[chosen];
    form?.showProblems(answer.problems.filter((one) => one.document === "datasets" && isAbout(one, entry)));
  }

  function jump(problem) {
    const at = (entries() ?? []).findIndex((entry) => isAbout(problem, entry));
    if (at >= 0) {
      open(at);
      detail.querySelector("details").open = true;
    }
    detail.scrollIntoView({ block: "start" });
  }

  function showSide() {
    const all = entries();
    const item = (entry, at) => {
      const scan = scans.get(entry?.id);
      return h("li", {}, h("button", { type: "button", class: "entry", "aria-current": at === chosen ? "true" : null, onclick: () => open(at) },
        h("span", { class: "grow" }, entry?.id ?? "(no id)"),
        scan ? h("span", { class: "badge" }, String(scan.pictures)) : null,
        h("span", { class: "small dim" }, `${kindText(entry)}${entry?.disabled === true ? ", disabled" : ""}`)));
    };
    side.replaceChildren();
    fill(side,
      all?.length ? h("ul", { class: "plain stack" }, all.map(item)) : null,
      h("div", { class: "stack" },
        button("Add a dataset", () => add("image"), { icon: "plus", disabled: all === null }),
        folderButton("Add a folder", addFolder, { disabled: all === null, title: "Copies its images and captions into datasets/ as a new dataset. You can also drop a folder here." }),
        button("Add a held-out dataset", () => add("eval"), { icon: "plus", disabled: all === null }),
        button("Add references or masks", addCondition, { icon: "plus", disabled: !all?.some(isImages) }),
        button("Add a text store", () => add("text_embeds"), { icon: "plus", disabled: all === null })));
  }

  function open(at) {
    chosen = at;
    showSide();
    showDetail();
  }

  function showDetail() {
    pictures?.close();
    pictures = form = null;
    const all = entries();
    detail.replaceChildren();
    if (all === null) {
      detail.append(h("p", { class: "panel warn" }, "The list is not valid JSON. Fix it below to get the form back."));
      return;
    }
    if (all.length === 0) {
      detail.append(h("section", { class: "sheet empty" }, h("h2", {}, "No datasets yet"),
        h("p", {}, "A dataset is a folder of images, each with a .txt file of the same name that contains its caption. Drop a folder here to add it as a dataset."),
        h("div", { class: "row" }, folderButton("Add a folder", addFolder, { kind: "primary" }), button("Add an empty dataset", () => add("image"), { icon: "plus" }))));
      return;
    }
    chosen = Math.min(chosen, all.length - 1);
    const entry = all[chosen];
    const last = all.length - 1;
    if (typeof entry !== "object" || entry === null) {
      detail.append(h("p", { class: "panel warn" }, "This entry is not an object. Fix it in the JSON below."));
      return;
    }
    form = datasetForm(schema, environment, chosen);
    const label = freshId("set");
    fill(detail, h("section", { class: "sheet stack", "aria-labelledby": label },
      h("div", { class: "head" }, h("h2", { id: label }, entry.id ?? "A dataset"), h("span", { class: "badge" }, kindText(entry)),
        button("", () => shift(-1), { icon: "up", label: "Move up", kind: "quiet", disabled: chosen === 0 }),
        button("", () => shift(1), { icon: "down", label: "Move down", kind: "quiet", disabled: chosen === last }),
        button("Remove", removeEntry, { icon: "trash", kind: "quiet" })),
      h("details", { open: form.kind === "text_embeds" || !entry.instance_data_dir }, h("summary", {}, "Options"), form.node)));
    if (form.kind !== "text_embeds") showPictures(entry);
    showProblems();
  }

  function showPictures(entry) {
    const folder = typeof entry.instance_data_dir === "string" ? entry.instance_data_dir : "";
    const scan = scans.get(entry.id) ?? null;
    pictures = datasetImages({
      folder, scan, captions: isImages(entry), textFiles: entry.caption_strategy === "textfile", whole: entry.disable_multiline_split === true,
    });
    pair();
    const label = freshId("images");
    const sheet = h("section", { class: "sheet stack", "aria-labelledby": label }, h("h2", { id: label }, "Images"));
    fill(detail, scan ? scanSummary(scan) : null, sheet);
    if (folder === "") {
      sheet.append(pictures.node);
      return;
    }
    const controls = uploadsTo(folder);
    const area = h("div", { class: "drop stack" }, controls.node, pictures.node);
    droppable(area, ({ incoming }) => controls.take(incoming));
    sheet.append(area);
  }

  /** Show the images beside their references and masks. */
  function pair() {
    const all = entries();
    const ids = [all?.[chosen]?.conditioning_data ?? []].flat();
    const conditions = ids.map((id) => all.find((entry) => entry?.id === id && kindOf(entry) === "conditioning"));
    pictures?.pair(conditions.filter((entry) => typeof entry?.instance_data_dir === "string" && entry.disabled !== true)
      .map((entry) => ({ id: entry.id, folder: entry.instance_data_dir, kind: entry.conditioning_type, isReference: isReference(entry) })));
  }

  function uploadsTo(folder) {
    if (!uploadsByFolder.has(folder)) {
      uploadsByFolder.set(folder, uploads(folder, () => {
        if (entries()?.[chosen]?.instance_data_dir !== folder) return;
        pictures?.open();
        check.later();
      }));
    }
    return uploadsByFolder.get(folder);
  }

  /** Add a dropped or chosen folder as a dataset, or upload files into the shown dataset. */
  async function addFolder({ name: folderName, incoming }) {
    const shown = entries()?.[chosen];
    if (folderName === "" && kindOf(shown) !== "text_embeds" && shown?.instance_data_dir) {
      await uploadsTo(shown.instance_data_dir).take(incoming);
      return;
    }
    const ids = new Set(entries().map((entry) => entry?.id));
    const id = await freeName(nameOf(folderName), async (candidate) => ids.has(candidate) || isFolder(`datasets/${candidate}`));
    const wasSaved = environment.unsaved.length === 0;
    change(withSet(id, "image", `datasets/${id}`));
    if (wasSaved) await edit.save();
    await uploadsTo(`datasets/${id}`).take(incoming);
  }

  function shift(by) {
    const at = chosen + by;
    chosen = at;
    change(move(text(), [], at - by, at));
  }

  async function removeEntry() {
    const { id } = entries()[chosen];
    if (!(await confirm(`Remove ${id ?? "this entry"}?`, "This removes it from the list. Its images stay in their folder.", "Remove", "danger"))) return;
    let newText = text();
    entries().forEach((entry, at) => {
      const named = [entry?.conditioning_data ?? []].flat();
      if (named.includes(id)) newText = withConditions(newText, at, named.filter((one) => one !== id));
    });
    change(set(newText, [chosen], null));
  }

  const withConditions = (list, at, ids) => set(list, [at, "conditioning_data"], ids.length === 0 ? null : JSON.stringify(ids));

  async function add(kind) {
    const taken = new Set(entries().map((entry) => entry?.id));
    const id = await ask(kind === "text_embeds" ? "Add a text store" : `Add ${kind === "eval" ? "a held-out dataset" : "a dataset"}`, {
      label: "Its id: a unique, stable name", yes: "Next",
      value: kind === "text_embeds" && !taken.has("text-embeds") ? "text-embeds" : "",
      check: (candidate) => (taken.has(candidate) ? "This id is taken." : /^[\w.-]+$/.test(candidate) ? "" : "Letters, digits, dots, dashes and underscores."),
    });
    if (id === null) return;
    if (kind === "text_embeds") {
      const newText = set(text(), [entries().length], indentedJson(store(id, !hasStore()), 1));
      chosen = entries().length;
      change(newText);
    } else change(withSet(id, kind, (await chooseFolder("datasets")) ?? `datasets/${id}`));
  }

  /** Add a reference or mask dataset, and name it in the image dataset it belongs to. */
  async function addCondition() {
    const all = entries();
    const at = freshId("condition");
    const kind = h("select", { id: at }, Object.entries(CONDITIONS).map(([value, label]) => h("option", { value }, label)));
    const owner = h("select", { id: `${at}-of` }, all.map((entry, index) => (isImages(entry) ? h("option", { value: index, selected: index === chosen }, entry.id) : null)).filter(Boolean));
    const answer = await dialog({
      title: "Add references or masks",
      body: h("div", { class: "stack" },
        h("div", {}, h("label", { for: kind.id }, "Content of the folder"), kind), h("div", {}, h("label", { for: owner.id }, "For the images of"), owner),
        h("p", { class: "hint" }, "A file belongs to the image of the same name: cat.png to cat.jpg. Several references of one image are cat.1.png, cat.2.png and so on.")),
      actions: [{ label: "Cancel", value: null }, { label: "Next", value: "next", kind: "primary" }],
    });
    if (answer === null) return;
    const images = all[owner.value];
    const { resolution = 1024, resolution_type } = images;
    const shape = kind.value === "reference_loose" ? { resolution, resolution_type } : {};
    const taken = new Set(all.map((entry) => entry?.id));
    const id = await freeName(`${images.id}-${isReference({ conditioning_type: kind.value }) ? "references" : "masks"}`, async (candidate) => taken.has(candidate));
    const folder = (await chooseFolder("datasets")) ?? `datasets/${id}`;
    const entry = { id, type: "local", dataset_type: "conditioning", conditioning_type: kind.value, instance_data_dir: folder, ...shape };
    const newText = withConditions(text(), Number(owner.value), [...[images.conditioning_data ?? []].flat(), id]);
    chosen = all.length;
    change(set(newText, [chosen], indentedJson(entry, 1)));
  }

  const hasStore = () => entries().some((entry) => kindOf(entry) === "text_embeds");
  const store = (id, isDefault) => ({ id, type: "local", dataset_type: "text_embeds", default: isDefault, cache_dir: "cache/text" });

  /** Return the list with one more dataset, which becomes the shown one, and with a text store if there was none. */
  function withSet(id, kind, folder) {
    const type = kind === "eval" ? { dataset_type: "eval" } : {};
    chosen = entries().length;
    const newText = set(text(), [chosen], indentedJson({ id, type: "local", ...type, instance_data_dir: folder, caption_strategy: "textfile", resolution: 1024, cache_dir_vae: `cache/vae/${id}`, ...(kind === "eval" ? {} : { repeats: 0 }) }, 1));
    return hasStore() ? newText : set(newText, [chosen + 1], indentedJson(store("text-embeds", true), 1));
  }

  async function scan() {
    if (!(await edit.save())) return;
    const result = await job.run("scan", "Scanning", { environment: name });
    if (result === null) return;
    scans = new Map(result.sets.map((one) => [one.id, one]));
    showSide();
    showDetail();
  }

  async function cache() {
    if (!(await edit.save())) return;
    const result = await job.run("cache", "Filling the caches", { environment: name });
    if (result !== null) {
      job.node.replaceChildren(h("p", { class: "panel good" }, `The caches are filled: ${plural(result.sets.length, "dataset")}.`));
      job.node.hidden = false;
    }
  }

  environment.addEventListener("edit", ({ detail: { document, source } }) => {
    check.later();
    if (document !== "datasets") return;
    const all = entries();
    if (source === "form" && all !== null) {
      form?.show();
      showSide();
      pair();
    } else {
      showSide();
      showDetail();
    }
  });

  fill(root,
    h("div", { class: "head" }, h("h1", {}, "Datasets"),
      h("div", { class: "row" }, edit.saveButton,
        button("Scan", scan, { icon: "search" }), button("Fill caches", cache, { icon: "download" }))),
    environmentBar({ list, name, screen: "datasets", verbs: false }),
    edit.banner, unsaved.node, job.node, problems.node,
    h("div", { class: "tabs" }, h("a", { href: to("configure", name) }, "Options"), h("a", { href: to("configure", name, { tab: "prompts" }) }, "Prompts"),
      h("a", { href: to("datasets", name), "aria-current": "true" }, "Datasets")),
    h("div", { class: "datasets-panes" }, side, detail),
    h("details", { class: "sheet" }, h("summary", {}, "The list as JSON"), raw.node));
  showSide();
  showDetail();
  check.now();
  droppable(root, addFolder);
  drafts.open().then(unsaved.show);
  if (pendingFolder !== null) {
    addFolder(pendingFolder);
    pendingFolder = null;
  }

  return () => {
    pictures?.close();
    unsaved.close();
    check.stop();
    job.close();
    edit.close();
  };
}

/** Whether an entry is an image dataset, for training or held out. */
const isImages = (entry) => ["image", "eval"].includes(kindOf(entry));

/** Whether a problem's message names this entry. */
const isAbout = ({ found }, entry) => typeof entry?.id === "string" && (found.includes(`, ${entry.id}: `) || found.startsWith(`${entry.id}: `));

/** A dataset id from a folder's name. */
const nameOf = (text) => text.normalize("NFKD").replace(/[^\w.-]+/g, "-").replace(/^[^A-Za-z0-9]+|-+$/g, "").slice(0, 60) || "images";

/** `stem`, or `stem-2`, `stem-3` and so on: the first that is free. */
async function freeName(stem, isTaken) {
  let name = stem;
  for (let number = 2; await isTaken(name); number += 1) name = `${stem}-${number}`;
  return name;
}

async function isFolder(path) {
  try {
    await get("folders", { path });
    return true;
  } catch (error) {
    if (error instanceof ApiFault && error.status === 404) return false;
    throw error;
  }
}

function nothing(root, list, requestedName) {
  /** Create an environment for a folder, and show it with the folder as its dataset. */
  async function begin(folder) {
    const taken = new Set(list.map((one) => one.name));
    const name = await freeName(nameOf(requestedName || folder.name), async (one) => taken.has(one));
    await post("environments", { name, kind: "empty", source: "" });
    pendingFolder = folder;
    go(to("datasets", name));
  }
  droppable(root, begin);
  fill(root, h("h1", {}, "Datasets"),
    list.length ? environmentBar({ list: [{ name: "" }, ...list.filter((one) => one.name !== "")], name: "", screen: "datasets", verbs: false }) : null,
    h("section", { class: "sheet empty" },
      h("h2", {}, list.length ? "Choose an environment" : "No environment yet"),
      h("p", {}, "Each environment has its own list of datasets. Drop a folder of images here to create an environment with it as a dataset."),
      list.length
        ? h("ul", { class: "plain row" }, list.map((one) => h("li", {}, h("a", { class: "button", href: to("datasets", one.name) }, one.name || "config/config.json"))))
        : null,
      h("div", { class: "row" }, folderButton("Add a folder", begin, { kind: "primary" }), list.length ? null : button("Create an empty one", () => go("#/configure/"), {}))));
}
