// The screen on which the list of datasets is built and its pictures are looked at.

import { get } from "./api.js";
import { checked, pausing, summary } from "./check.js";
import { ask, button, confirm, fill, freshId, h } from "./dom.js";
import { editing } from "./editing.js";
import { Environment } from "./environment.js";
import { environmentBar } from "./environments.js";
import { chooseFolder } from "./folders.js";
import { some } from "./format.js";
import { jobPanel } from "./job.js";
import { move, set, written } from "./jsontext.js";
import { examined, rawEditor } from "./raw.js";
import { go, to } from "./router.js";
import { scanSummary } from "./scanned.js";
import { KINDS, kindOf, setForm } from "./setform.js";
import { setPictures } from "./setpictures.js";
import { uploads } from "./uploads.js";

/** Show the dataset list of environment `params.name`. */
export async function datasets(root, { name }) {
  const [list, schema] = await Promise.all([get("environments"), get("form")]);
  if (!list.some((one) => one.name === name)) {
    nothing(root, list);
    return () => {};
  }
  const environment = await Environment.open(name);
  const edit = editing(environment);
  const job = jobPanel();
  const problems = summary(jump);
  const raw = rawEditor(environment, "datasets", { kind: "array", label: "The list as JSON", rows: 18 });
  let answer = { problems: [], notices: [] };
  /** Set id to its part of the last scan. */
  let scans = new Map();
  let chosen = 0;
  let form = null;
  let pictures = null;

  const side = h("nav", { class: "stack sets", "aria-label": "Entries of the list" });
  const detail = h("div", { class: "stack detail" });
  const text = () => environment.text("datasets");
  const entries = () => examined(text(), "array").root?.value ?? null;
  const change = (wanted) => environment.edit("datasets", wanted, "list");

  const check = pausing(400, async (signal) => {
    answer = await checked(environment.draft(), signal);
    problems.show({ problems: answer.problems.filter((one) => one.document === "datasets"), notices: answer.notices });
    blame();
  });

  function blame() {
    const entry = entries()?.[chosen];
    form?.blame(answer.problems.filter((one) => one.document === "datasets" && isAbout(one, entry)));
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
        h("span", { class: "grow" }, entry?.id ?? "without an id"),
        scan ? h("span", { class: "badge" }, String(scan.pictures)) : null,
        h("span", { class: "small dim" }, `${KINDS[kindOf(entry)]}${entry?.disabled === true ? ", left out" : ""}`)));
    };
    side.replaceChildren();
    fill(side,
      all?.length ? h("ul", { class: "plain stack" }, all.map(item)) : null,
      h("div", { class: "stack" },
        button("Add a set", () => add("image"), { icon: "plus", disabled: all === null }),
        button("Add a held-out set", () => add("eval"), { icon: "plus", disabled: all === null }),
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
      detail.append(h("p", { class: "panel warn" }, "The list is no JSON yet: mend it below, and the form comes back."));
      return;
    }
    if (all.length === 0) {
      detail.append(h("section", { class: "sheet empty" }, h("h2", {}, "No datasets yet"),
        h("p", {}, "A set is a folder of pictures, each with a .txt file of the same name that holds its caption. Add one and bring your pictures in."),
        button("Add a set", () => add("image"), { icon: "plus", kind: "primary" })));
      return;
    }
    chosen = Math.min(chosen, all.length - 1);
    const entry = all[chosen];
    const last = all.length - 1;
    if (typeof entry !== "object" || entry === null) {
      detail.append(h("p", { class: "panel warn" }, "This entry is no object: mend it in the JSON below."));
      return;
    }
    form = setForm(schema, environment, chosen);
    const label = freshId("set");
    fill(detail, h("section", { class: "sheet stack", "aria-labelledby": label },
      h("div", { class: "head" }, h("h2", { id: label }, entry.id ?? "A set"), h("span", { class: "badge" }, KINDS[form.kind]),
        button("", () => shift(-1), { icon: "up", label: "Move it up", kind: "quiet", disabled: chosen === 0 }),
        button("", () => shift(1), { icon: "down", label: "Move it down", kind: "quiet", disabled: chosen === last }),
        button("Remove", removeEntry, { icon: "trash", kind: "quiet" })),
      h("details", { open: form.kind === "text_embeds" || !entry.instance_data_dir }, h("summary", {}, "Options"), form.node)));
    if (form.kind !== "text_embeds") showPictures(entry);
    blame();
  }

  function showPictures(entry) {
    const folder = typeof entry.instance_data_dir === "string" ? entry.instance_data_dir : "";
    const scan = scans.get(entry.id) ?? null;
    pictures = setPictures({ folder, scan, textFiles: entry.caption_strategy === "textfile" });
    const drop = uploads(() => folder, () => {
      pictures?.open();
      check.later();
    });
    if (folder !== "") drop.node.append(pictures.node);
    const label = freshId("pictures");
    fill(detail,
      scan ? scanSummary(scan) : null,
      h("section", { class: "sheet stack", "aria-labelledby": label },
        h("h2", { id: label }, "Pictures"), folder === "" ? pictures.node : drop.node));
  }

  function shift(by) {
    const at = chosen + by;
    chosen = at;
    change(move(text(), [], at - by, at));
  }

  async function removeEntry() {
    const { id } = entries()[chosen];
    if (await confirm(`Remove ${id ?? "this entry"}?`, "It leaves the list. Its pictures stay where they are.", "Remove", "danger")) {
      change(set(text(), [chosen], null));
    }
  }

  async function add(kind) {
    const taken = new Set(entries().map((entry) => entry?.id));
    const id = await ask(KINDS[kind] === "Text store" ? "Add a text store" : `Add ${kind === "eval" ? "a held-out set" : "a set"}`, {
      label: "Its id: a unique, stable name", yes: "Next",
      value: kind === "text_embeds" && !taken.has("text-embeds") ? "text-embeds" : "",
      check: (wanted) => (taken.has(wanted) ? "There is one of that name." : /^[\w.-]+$/.test(wanted) ? "" : "Letters, digits, dots, dashes and underscores."),
    });
    if (id === null) return;
    let wanted = text();
    const hasStore = entries().some((entry) => kindOf(entry) === "text_embeds");
    const store = { id, type: "local", dataset_type: "text_embeds", default: !hasStore, cache_dir: "cache/text" };
    if (kind === "text_embeds") wanted = set(wanted, [entries().length], written(store, 1));
    else {
      const folder = await chooseFolder("datasets");
      const type = kind === "eval" ? { dataset_type: "eval" } : {};
      wanted = set(wanted, [entries().length], written({ id, type: "local", ...type, instance_data_dir: folder ?? `datasets/${id}`, caption_strategy: "textfile", resolution: 1024, cache_dir_vae: `cache/vae/${id}`, ...(kind === "eval" ? {} : { repeats: 0 }) }, 1));
      if (!hasStore) wanted = set(wanted, [entries().length + 1], written({ ...store, id: "text-embeds" }, 1));
    }
    chosen = entries().length;
    change(wanted);
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
      job.node.replaceChildren(h("p", { class: "panel good" }, `The caches are filled: ${some(result.sets.length, "set")}.`));
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
    edit.banner, job.node, problems.node,
    h("div", { class: "tabs" }, h("a", { href: to("configure", name) }, "Options"), h("a", { href: to("configure", name, { tab: "prompts" }) }, "Prompts"),
      h("a", { href: to("datasets", name), "aria-current": "true" }, "Datasets")),
    h("div", { class: "datasets-panes" }, side, detail),
    h("details", { class: "sheet" }, h("summary", {}, "The list as JSON"), raw.node));
  showSide();
  showDetail();
  check.now();

  return () => {
    pictures?.close();
    check.stop();
    job.close();
    edit.close();
  };
}

/** Whether a problem names this entry of the list. */
const isAbout = ({ found }, entry) => typeof entry?.id === "string" && (found.includes(`, ${entry.id}: `) || found.startsWith(`${entry.id}: `));

function nothing(root, list) {
  fill(root, h("h1", {}, "Datasets"),
    list.length ? environmentBar({ list: [{ name: "" }, ...list.filter((one) => one.name !== "")], name: "", screen: "datasets", verbs: false }) : null,
    h("section", { class: "sheet empty" },
      h("h2", {}, list.length ? "Choose an environment" : "No environment yet"),
      h("p", {}, "Each environment has its own list of datasets."),
      list.length
        ? h("ul", { class: "plain row" }, list.map((one) => h("li", {}, h("a", { class: "button", href: to("datasets", one.name) }, one.name || "config/config.json"))))
        : button("Make one", () => go("#/configure/"), { kind: "primary" })));
}
