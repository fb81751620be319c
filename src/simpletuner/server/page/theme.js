// A classic script in the head, not a module, so that it sets the theme before the first paint.
"use strict";

{
  const KEY = "simpletuner.theme";
  const ORDER = ["system", "light", "dark"];
  const root = document.documentElement;

  const storedTheme = () => {
    const value = localStorage.getItem(KEY);
    return value !== null && ORDER.includes(value) ? value : "system";
  };

  const apply = (theme) => {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
  };

  apply(storedTheme());

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => {
      const word = { system: "auto", light: "light", dark: "dark" }[storedTheme()];
      button.querySelector("span").textContent = word;
      button.setAttribute("aria-label", `Theme: ${word}. Press to change.`);
    };
    name();
    button.addEventListener("click", () => {
      const next = ORDER[(ORDER.indexOf(storedTheme()) + 1) % ORDER.length];
      localStorage.setItem(KEY, next);
      apply(next);
      name();
      document.dispatchEvent(new CustomEvent("theme", { detail: next }));
    });
  });
}
