// Entry point: the page's frame, and the module of each screen.

import { problemsOf, toast } from "./dom.js";
import { SOON_MS, schedulePoll } from "./feed.js";
import { follow } from "./router.js";

const SCREENS = {
  home: { title: "Runs", load: async () => (await import("./home.js")).home },
  configure: { title: "Configure", load: async () => (await import("./configure.js")).configure },
  datasets: { title: "Datasets", load: async () => (await import("./datasets.js")).datasets },
  files: { title: "Files", load: async () => (await import("./files.js")).files },
  run: { title: "Run", load: async () => (await import("./run.js")).run },
  compare: { title: "Compare", load: async () => (await import("./compare.js")).compare },
};

const PREPARE_AFTER_MS = 500;

const main = document.getElementById("main");
const menu = document.getElementById("menu");
const nav = document.getElementById("nav");

function unfold(open) {
  menu.setAttribute("aria-expanded", String(open));
  nav.classList.toggle("open", open);
}

menu.addEventListener("click", () => unfold(menu.getAttribute("aria-expanded") === "false"));
window.addEventListener("hashchange", () => unfold(false));

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

// Errors that no screen caught are shown as toasts.
window.addEventListener("unhandledrejection", (event) => {
  if (event.reason?.name === "AbortError") return;
  for (const problem of problemsOf(event.reason)) toast(problem.text, "bad");
});

schedulePoll(SOON_MS);
await follow(main, SCREENS);

// Preload the other screens. If one fails, the error is shown when it is opened.
setTimeout(() => Promise.allSettled(Object.values(SCREENS).map(({ load }) => load())), PREPARE_AFTER_MS);
