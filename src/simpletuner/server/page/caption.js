// An image's caption, edited in place and saved after a pause or when the field loses focus.

import { ApiFault, get } from "./api.js";
import { drafts } from "./captiondrafts.js";
import { button, fill, freshId, h } from "./dom.js";
import { plural } from "./format.js";

/** @param {string} path of the image @param {string} name the image's, for labels */
export function captionBox(path, name) {
  const id = freshId("caption");
  const state = h("div", { class: "small dim", "aria-live": "polite" });
  const area = h("textarea", {
    id, rows: "3", disabled: true, placeholder: "…", onblur: () => drafts.send(path),
    oninput() {
      drafts.type(path, area.value, current.revision);
      state.textContent = "Not saved yet";
    },
  });
  let current = { text: "", revision: "" };
  let isClosed = false;

  function take(answer) {
    current = answer;
    area.value = answer.text ?? "";
    state.replaceChildren();
  }

  function show({ detail: { path: about, saved } }) {
    if (about !== path) return;
    const draft = drafts.of(path);
    if (saved !== null) {
      current = saved;
      state.textContent = draft ? "Not saved yet" : "Saved";
    }
    if (draft?.theirs || draft?.fault) state.replaceChildren(unsaved(path, draft, take));
  }

  async function load() {
    drafts.addEventListener("state", show);
    try {
      await drafts.open();
      const answer = await get("caption", { path });
      if (isClosed) return;
      take(answer);
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      state.replaceChildren(h("p", { class: "fault" }, error.problems.map((one) => one.text).join(" ")), button("Try again", load, { kind: "tiny" }));
      return;
    }
    area.disabled = false;
    area.placeholder = "No caption yet";
    const draft = drafts.of(path);
    if (draft === undefined) return;
    area.value = draft.text;
    state.textContent = "This is your earlier draft. It is being saved.";
    show({ detail: { path, saved: null } });
    await drafts.send(path);
  }

  return {
    node: h("div", { class: "caption" }, h("label", { for: id, class: "visually-hidden" }, `Caption of ${name}`), area, state),
    load,
    close() {
      isClosed = true;
      drafts.removeEventListener("state", show);
      drafts.send(path);
    },
  };
}

/** Says why a draft is not saved. If somebody else saved a different text, shows both and lets the user choose. */
function unsaved(path, draft, take = () => {}) {
  if (!draft.theirs) {
    return h("div", { class: "stack tight" }, h("p", { class: "fault" }, `Not saved: ${draft.fault}`),
      draft.refused
        ? h("div", { class: "row" }, button("Try again", () => drafts.send(path), { kind: "tiny" }), button("Discard it", () => drafts.discard(path), { kind: "tiny" }))
        : h("p", {}, "It is kept in this browser and saved once the server answers."));
  }
  return h("div", { class: "panel warn stack tight", role: "alert" },
    h("p", {}, "Somebody else changed this caption. Theirs:"), h("blockquote", {}, draft.theirs.text ?? "(none)"),
    h("p", {}, "Yours:"), h("blockquote", {}, draft.text),
    h("div", { class: "row" },
      button("Keep mine", () => drafts.overwrite(path), { kind: "tiny" }),
      button("Take theirs", () => {
        const { theirs } = drafts.of(path);
        drafts.discard(path);
        take(theirs);
      }, { kind: "tiny" })));
}

/**
 * Unsaved drafts of images that are not shown. @param {() => Set<string>} shown paths of the shown images
 * @returns {{node: HTMLElement, show: () => void, close: () => void}}
 */
export function unsavedCaptions(shown) {
  const node = h("div", { class: "stack", "aria-live": "polite" });
  const show = () => {
    const boxed = shown();
    const open = drafts.all.filter(([path, draft]) => !boxed.has(path) && (draft.theirs || draft.fault));
    node.replaceChildren();
    if (open.length === 0) return;
    fill(node, h("details", { class: "panel warn", open: true }, h("summary", {}, `${plural(open.length, "caption")} that you typed ${open.length === 1 ? "is" : "are"} not saved yet`),
      open.map(([path, draft]) => h("div", { class: "stack tight" }, h("p", { class: "small path" }, path),
        draft.theirs ? null : h("blockquote", {}, draft.text), unsaved(path, draft)))));
  };
  drafts.addEventListener("state", show);
  return { node, show, close: () => drafts.removeEventListener("state", show) };
}
