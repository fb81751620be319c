// Show the screen that the address after # names, and ask before leaving one.

import { h, problemPanel } from "./dom.js";
import { screenTitle } from "./title.js";

/** @type {(() => Promise<boolean>) | null} */
let guard = null;
let shown = "";
let lastRequest = 0;

/** Ask `question` before this screen is left; null asks nothing. */
export function askBeforeLeaving(question) {
  guard = question;
}

/** Show another screen: `go("#/run?run=output/a")`. */
export function go(hash) {
  if (location.hash === hash) window.dispatchEvent(new HashChangeEvent("hashchange"));
  else location.hash = hash;
}

/** The address of a screen: `to("configure", "my env")`, `to("run", "", {run})`. */
export function to(screen, name = "", params = {}) {
  const query = new URLSearchParams(params).toString();
  const path = name === "" && query ? `#/${screen}` : `#/${screen}/${encodeURIComponent(name)}`;
  return query ? `${path}?${query}` : path;
}

/** Change the address without loading a screen. */
export function rename(hash) {
  history.replaceState(null, "", hash);
  shown = hash;
}

function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [screen, name = ""] = path.split("/");
  return { screen: screen || "home", params: { name: decodeURIComponent(name), ...Object.fromEntries(new URLSearchParams(query)) } };
}

/**
 * Show the address's screen, now and after each change.
 * @param {HTMLElement} main element that shows the screens
 * @param {Record<string, {title: string, load: () => Promise<(root: HTMLElement, params: object) => Promise<() => void>>}>} screens
 */
export function follow(main, screens) {
  let leave = () => {};

  async function show() {
    const requestNumber = ++lastRequest;
    shown = location.hash;
    guard = null;
    leave();
    leave = () => {};
    const { screen, params } = parse(shown);
    const entry = screens[screen];
    for (const link of document.querySelectorAll("[data-screen]")) {
      const current = link.dataset.screen === screen;
      if (current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const root = h("div", { class: `screen ${screen}` });
    main.replaceChildren(root);
    if (entry === undefined) {
      screenTitle("Not found – simpletuner");
      root.append(h("h1", {}, "There is no such screen"), h("p", {}, h("a", { href: "#/" }, "Back to the runs")));
      return;
    }
    screenTitle(`${params.name || params.run || entry.title} – simpletuner`);
    root.append(h("p", { class: "loading" }, "Loading …"));
    try {
      const open = await entry.load();
      const body = h("div", { class: "screen-body" });
      const closing = await open(body, params);
      if (requestNumber !== lastRequest) {
        closing?.();
        return;
      }
      leave = closing ?? (() => {});
      root.replaceChildren(body);
    } catch (error) {
      console.error(error);
      if (requestNumber === lastRequest) root.replaceChildren(h("h1", {}, entry.title), problemPanel(error));
    }
  }

  window.addEventListener("hashchange", async () => {
    if (location.hash === "#main") return;
    if (guard !== null && location.hash !== shown) {
      const target = location.hash;
      history.replaceState(null, "", shown);
      if (!(await guard())) return;
      guard = null;
      go(target);
      return;
    }
    await show();
    main.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  });
  return show();
}
