/** The screen of one run: its status, curves, images, checkpoints, LoRA trial and log. */

import { Checkpoints } from "./checkpoints.js";
import { Curves } from "./curves.js";
import { h } from "./dom.js";
import { CURVES, RunStore } from "./events.js";
import { Gallery } from "./gallery.js";
import { Header, goneText } from "./header.js";
import { Log } from "./log.js";
import { rename, to } from "./router.js";
import { TryIt } from "./tryit.js";
import { Verbs } from "./verbs.js";

const TABS = { overview: "Overview", checkpoints: "Checkpoints", try: "Try it", log: "Log" };

/** @param {HTMLElement} root @param {{run: string, tab?: string}} params */
export async function run(root, params) {
  if (!params.run) {
    root.replaceChildren(h("h1", {}, "Run"), h("p", {}, "The address names no run. ", h("a", { href: "#/" }, "Choose one.")));
    return () => {};
  }
  const store = new RunStore(params.run);
  try {
    await store.open();
  } catch (error) {
    if (error.status !== 404) throw error;
    root.replaceChildren(h("h1", {}, "Run"), ...goneText(params.run));
    return () => {};
  }
  const detail = () => store.detail;
  const verbs = new Verbs(detail, () => store.refresh());
  const curves = new Curves([{ name: store.detail.name, color: 1, steps: store.steps, heldOut: store.heldOut, drift: store.drift }]);
  const gallery = new Gallery(params.run, detail);
  const checkpoints = new Checkpoints(params.run, detail, (options) => verbs.start(options));
  const tryIt = new TryIt(params.run, detail);
  const log = new Log(params.run, detail);
  const panels = { overview: [curves.losses, gallery.node, curves.others], checkpoints: [checkpoints.node], try: [tryIt.node], log: [log.node] };
  const tabs = new Tabs(panels, (tab) => {
    rename(to("run", "", tab === "overview" ? { run: params.run } : { run: params.run, tab }));
    log.show(tab === "log");
    if (tab === "checkpoints") checkpoints.update();
    if (tab === "try") tryIt.show();
  });
  const header = new Header(store, verbs.node, (tab) => tabs.show(tab));
  root.replaceChildren(header.node, tabs.node);

  const refresh = (topics) => {
    if (topics.has("status") || topics.has("connection")) {
      header.update();
      verbs.update();
    }
    if (CURVES.some((topic) => topics.has(topic))) curves.update();
    if (topics.has("validations") || topics.has("status")) gallery.update();
    if (topics.has("notices")) log.update();
    if (topics.has("checkpoints") && tabs.current === "checkpoints") checkpoints.update();
  };
  store.subscribe(refresh);
  header.update();
  verbs.update();
  tabs.show(params.tab in TABS ? params.tab : "overview", false);
  return () => {
    store.close();
    header.close();
    curves.close();
    log.close();
    tryIt.close();
  };
}

/** Tabs, with arrow-key navigation. */
class Tabs {
  constructor(panels, shown) {
    this.shown = shown;
    this.current = null;
    const names = Object.keys(panels);
    this.buttons = new Map(names.map((name) => [name, h("button", {
      type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, onclick: () => this.show(name),
      onkeydown: (event) => {
        const along = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (along === undefined) return;
        event.preventDefault();
        this.show(names[(names.indexOf(name) + along + names.length) % names.length]);
      },
    }, TABS[name])]));
    this.panels = new Map(names.map((name) => [name, h("div", {
      role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}`, class: "stack", hidden: true,
    }, panels[name])]));
    this.node = h("div", { class: "stack" },
      h("div", { class: "tabs", role: "tablist", "aria-label": "Parts of the run" }, [...this.buttons.values()]), [...this.panels.values()]);
  }

  show(name, isFocused = true) {
    this.current = name;
    for (const [other, node] of this.buttons) {
      node.setAttribute("aria-selected", String(other === name));
      node.tabIndex = other === name ? 0 : -1;
      this.panels.get(other).hidden = other !== name;
    }
    this.buttons.get(name).scrollIntoView({ block: "nearest", inline: "nearest" });
    if (isFocused) this.buttons.get(name).focus();
    this.shown(name);
  }
}
