// The screen that edits an environment's options and prompts.

import { get, post } from "./api.js";
import { choicesPanel } from "./choices.js";
import { checked, pausing, summary } from "./check.js";
import { button, fill, freshId, h, toast } from "./dom.js";
import { environmentBar, importButton, importFile, make } from "./environments.js";
import { editing } from "./editing.js";
import { Environment } from "./environment.js";
import { optionsForm, withOption } from "./form.js";
import { read, set } from "./jsontext.js";
import { planPanel } from "./plan.js";
import { promptsPane } from "./prompts.js";
import { examined, rawEditor } from "./raw.js";
import { go, to } from "./router.js";
import { kindOf } from "./setform.js";

/** Show the environment `params.name`; "" stands for config/config.json. */
export async function configure(root, { name, tab = "options" }) {
  const [list, schema, offer] = await Promise.all([get("environments"), get("form"), get("recipes")]);
  if (!list.some((one) => one.name === name)) {
    nothing(root, list, name);
    return dropping(root, list);
  }
  const environment = await Environment.open(name);
  const edit = editing(environment);
  const stopDropping = dropping(root, list);
  const toml = environment.isToml("config");

  const problems = summary(jump);
  const form = toml ? null : optionsForm(schema, environment);
  const raw = rawEditor(environment, "config", { kind: toml ? null : "object", label: toml ? "The file" : "As JSON", rows: toml ? 34 : 20 });
  const fields = new Map(schema.groups.flatMap((group) => group.fields.map((field) => [field.name, field])));
  const choices = toml ? null : choicesPanel(offer, fields, environment, () => check.later());
  const plan = planPanel(() => environment.draft(), () => choices?.machine() ?? { vram_gib: null, ram_gib: null }, apply,
    (steps) => choices?.longer(steps) ?? null);
  let answer = null;

  const check = pausing(400, async (signal) => {
    answer = await checked(environment.draft(), signal);
    problems.show(answer);
    form?.showProblems(answer.problems);
    showForm();
    if (answer.problems.length === 0) plan.later();
    else plan.wait("Fix the problems above before you start a run.");
  });

  function showForm() {
    if (form === null) return;
    const text = environment.text("config");
    const { root: parsed } = examined(text, "object");
    choices.show(parsed, text);
    form.show(parsed, text, answer);
  }

  function apply(changes) {
    let text = environment.text("config");
    for (const [option, value] of Object.entries(changes)) {
      if (option === "resolution") {
        setResolution(value);
        continue;
      }
      text = withOption(text, option, JSON.stringify(value));
    }
    environment.edit("config", text, "plan");
    toast(`Set ${Object.entries(changes).map(([option, value]) => `${option} = ${value}`).join(", ")}.`, "good");
  }

  /** The resolution is not an option of the config: each image dataset has its own. */
  function setResolution(value) {
    let text = environment.text("datasets");
    read(text).value.forEach((entry, at) => {
      if (kindOf(entry) !== "text_embeds") text = set(text, [at, "resolution"], JSON.stringify(value));
    });
    environment.edit("datasets", text, "plan");
  }

  function jump(problem) {
    if (problem.document === "datasets") {
      go(to("datasets", name));
    } else if (problem.document === "prompts") {
      select("prompts");
    } else {
      select("options");
      if (!(problem.key !== "" && form?.jump(problem.key))) raw.focus();
    }
  }

  async function launch(work) {
    if (!(await edit.save())) return;
    await work();
  }

  const actions = fill(h("div", { class: "row" }),
    edit.saveButton,
    button("Add to queue", () => launch(async () => {
      await post("queue", { environment: name, options: {} });
      toast("Added to the queue. It starts when the runs before it have ended.", "good");
    }), { icon: "queue" }),
    button("Start", () => launch(async () => {
      const { run } = await post("run/start", { environment: name, options: {} });
      go(to("run", "", { run }));
    }), { icon: "play", kind: "primary" }));

  const options = h("div", { class: "stack options-pane" },
    choices?.node, plan.node, choices?.result,
    toml
      ? h("section", { class: "sheet stack", "aria-label": "The config" },
        h("p", { class: "panel" }, "This config is TOML, so it is edited as text. The form edits JSON only."), raw.node)
      : h("div", { class: "configure-panes" }, form.node,
        h("section", { class: "sheet beside", "aria-label": "The config as JSON" }, raw.node)));
  const panes = { options, prompts: promptsPane(environment) };
  const { bar: tabs, select } = tabBar(panes, name, tab);

  fill(root,
    h("div", { class: "head" }, h("h1", {}, "Configure"), actions),
    environmentBar({ list, name, screen: "configure", verbs: true }),
    edit.banner, problems.node, tabs, Object.values(panes));

  environment.addEventListener("edit", ({ detail }) => {
    if (detail.document === "config") {
      showForm();
      if (detail.source !== "form" && detail.source !== "raw") form?.arrange();
    }
    check.later();
  });
  const { root: parsed } = examined(environment.text("config"), "object");
  if (parsed !== null) choices?.adopt(parsed, environment.text("config"));
  showForm();
  form?.arrange();
  check.now();

  return () => {
    stopDropping();
    check.stop();
    plan.stop();
    edit.close();
  };
}

function tabBar(panes, name, first) {
  const tabs = new Map(Object.entries(panes).map(([key, pane]) => {
    pane.id = freshId("pane");
    pane.setAttribute("role", "tabpanel");
    const id = freshId("tab");
    pane.setAttribute("aria-labelledby", id);
    const tab = h("button", { type: "button", role: "tab", id, "aria-controls": pane.id, onclick: () => select(key) },
      key.charAt(0).toUpperCase() + key.slice(1));
    return [key, tab];
  }));

  function select(key) {
    for (const [other, tab] of tabs) {
      tab.setAttribute("aria-selected", String(other === key));
      tab.tabIndex = other === key ? 0 : -1;
      panes[other].hidden = other !== key;
    }
  }

  const list = h("div", { role: "tablist", "aria-label": "Files of the environment", class: "row", onkeydown(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    const keys = [...tabs.keys()];
    const at = keys.findIndex((key) => tabs.get(key) === document.activeElement);
    const next = keys[(at + step + keys.length) % keys.length];
    select(next);
    tabs.get(next).focus();
  } }, [...tabs.values()]);
  select(first in panes ? first : "options");
  return { bar: h("div", { class: "tabs" }, list, h("a", { href: to("datasets", name) }, "Datasets")), select };
}

/** Shown if there is no such environment. */
function nothing(root, list, name) {
  const first = list.length === 0;
  const note = first
    ? "An environment is a folder of plain files: the options, the list of datasets and the prompts. Create one from the built-in example for a training run of three minutes, or start with an empty one."
    : `There is no environment ${name === "" ? "config/config.json" : `“${name}”`}. Choose another, or create one.`;
  fill(root,
    h("div", { class: "head" }, h("h1", {}, "Configure")),
    first ? null : h("ul", { class: "plain grid" }, list.map((one) => h("li", { class: "card stack" },
      h("h2", {}, h("a", { href: to("configure", one.name) }, one.name === "" ? "config/config.json" : one.name)),
      h("p", { class: "hint mono path" }, one.path)))),
    h("section", { class: "sheet empty" },
      h("h2", {}, first ? "No environment yet" : "New environment"),
      h("p", {}, note),
      h("div", { class: "row" },
        button("From an example", () => make(list, "example"), { icon: "plus", kind: first ? "primary" : "" }),
        button("Empty", () => make(list, "empty"), { icon: "file" }),
        importButton(list)),
      h("p", { class: "small" }, "You can also drop an exported zip or a config.json here.")));
}

/** Import a dropped zip or config. */
function dropping(root, list) {
  const over = (event) => {
    if ([...event.dataTransfer.types].includes("Files")) event.preventDefault();
  };
  const drop = (event) => {
    if (event.dataTransfer.files.length === 0) return;
    event.preventDefault();
    importFile(list, event.dataTransfer.files[0]);
  };
  root.addEventListener("dragover", over);
  root.addEventListener("drop", drop);
  return () => {
    root.removeEventListener("dragover", over);
    root.removeEventListener("drop", drop);
  };
}
