// Which screen the address after # shows, and leaving it with consent.

import { h, problemPanel } from "./dom.js";
import { screenTitle } from "./title.js";

/** @type {(() => Promise<boolean>) | null} */
let guard = null;
let shown = "";
let turn = 0;

/** Ask `question` before the screen is left; null asks nothing. It ends with the screen. */
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

/** Change the address in place, without another screen being shown. */
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
 * Follow the address from now on.
 * @param {HTMLElement} main where screens are shown
 * @param {Record<string, {title: string, load: () => Promise<(root: HTMLElement, params: object) => Promise<() => void>>}>} screens
 */
export function follow(main, screens) {
  let leave = () => {};

  async function show() {
    const mine = ++turn;
    shown = location.hash;
    guard = null;
    leave();
    leave = () => {};
    const { screen, params } = parse(shown);
    const known = screens[screen];
    for (const link of document.querySelectorAll("[data-screen]")) {
      const current = link.dataset.screen === screen;
      if (current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const root = h("div", { class: `screen ${screen}` });
    main.replaceChildren(root);
    if (known === undefined) {
      screenTitle("Not found – simpletuner");
      root.append(h("h1", {}, "There is no such screen"), h("p", {}, h("a", { href: "#/" }, "Back to the runs")));
      return;
    }
    screenTitle(`${params.name || params.run || known.title} – simpletuner`);
    root.append(h("p", { class: "loading" }, "Loading …"));
    try {
      const open = await known.load();
      const own = h("div", { class: "screen-body" });
      const closing = await open(own, params);
      if (mine !== turn) {
        closing?.();
        return;
      }
      leave = closing ?? (() => {});
      root.replaceChildren(own);
    } catch (error) {
      console.error(error);
      if (mine === turn) root.replaceChildren(h("h1", {}, known.title), problemPanel(error));
    }
  }

  window.addEventListener("hashchange", async () => {
    if (location.hash === "#main") return;
    if (guard !== null && location.hash !== shown) {
      const wanted = location.hash;
      history.replaceState(null, "", shown);
      if (!(await guard())) return;
      guard = null;
      go(wanted);
      return;
    }
    await show();
    main.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  });
  return show();
}
