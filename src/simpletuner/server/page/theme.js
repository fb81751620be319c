// A plain script in the head, not a module: it sets the theme before anything is painted.
"use strict";

{
  const KEY = "simpletuner.theme";
  const ORDER = ["system", "light", "dark"];
  const root = document.documentElement;

  const kept = () => {
    const value = localStorage.getItem(KEY);
    return value !== null && ORDER.includes(value) ? value : "system";
  };

  const apply = (theme) => {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
  };

  apply(kept());

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => {
      const word = { system: "auto", light: "light", dark: "dark" }[kept()];
      button.querySelector("span").textContent = word;
      button.setAttribute("aria-label", `Theme: ${word}. Press to change.`);
    };
    name();
    button.addEventListener("click", () => {
      const next = ORDER[(ORDER.indexOf(kept()) + 1) % ORDER.length];
      localStorage.setItem(KEY, next);
      apply(next);
      name();
      document.dispatchEvent(new CustomEvent("theme", { detail: next }));
    });
  });
}
