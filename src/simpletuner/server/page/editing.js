// Shared by the screens that edit an environment: saving, asking before leaving, and the banner about changes on disk.

import { button, confirm, h, toast } from "./dom.js";
import { askBeforeLeaving } from "./router.js";

/**
 * The save button, Ctrl+S, the questions before leaving and the banner.
 * @param {import("./environment.js").Environment} environment
 * @returns {{save: () => Promise<boolean>, saveButton: HTMLElement, banner: HTMLElement, close: () => void}}
 */
export function editing(environment) {
  const mark = h("span", { class: "hint", "aria-live": "polite" });
  const press = button("Save", () => save(), { icon: "save", title: "Ctrl+S", "aria-keyshortcuts": "Control+S" });
  const banner = h("div", { class: "stack", "aria-live": "polite" });

  async function save() {
    if (environment.unsaved.length === 0) return true;
    press.disabled = true;
    try {
      const saved = await environment.save();
      if (saved) toast("Saved.", "good");
      return saved;
    } finally {
      state();
    }
  }

  function state() {
    const unsaved = environment.unsaved.length > 0;
    press.disabled = !unsaved;
    mark.textContent = unsaved ? "Not saved yet" : "";
    const changed = Object.entries(environment.outside).map(([document, theirs]) =>
      h("div", { class: "panel warn row" },
        h("p", { class: "grow" }, `${theirs.path} has changed on disk, and you have changed it here too.`),
        button("Show the differences", () => environment.settle(document, theirs))));
    const gone = environment.gone
      ? h("p", { class: "panel warn" }, "The files of this environment were deleted. Saving writes them again.")
      : null;
    banner.replaceChildren(...changed, ...(gone ? [gone] : []));
    banner.hidden = banner.childElementCount === 0;
    if (!unsaved) askBeforeLeaving(null);
    else {
      askBeforeLeaving(() =>
        confirm("Leave without saving?", "Your changes are not saved to the files yet.", "Leave", "danger"));
    }
  }

  const onKey = (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") {
      event.preventDefault();
      save();
    }
  };
  const onUnload = (event) => {
    if (environment.unsaved.length > 0) event.preventDefault();
  };
  document.addEventListener("keydown", onKey);
  window.addEventListener("beforeunload", onUnload);
  environment.addEventListener("state", state);
  const stopWatching = environment.watch();
  state();

  return {
    save,
    saveButton: h("span", { class: "row" }, mark, press),
    banner,
    close() {
      stopWatching();
      document.removeEventListener("keydown", onKey);
      window.removeEventListener("beforeunload", onUnload);
    },
  };
}
