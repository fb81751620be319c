// The caption of a picture, edited in place and written when it is left.

import { ApiFault, get, put } from "./api.js";
import { diffBlock } from "./diff.js";
import { dialog, freshId, h } from "./dom.js";

/** @param {string} path of the picture @param {string} name to call it by */
export function captionBox(path, name) {
  const id = freshId("caption");
  const state = h("span", { class: "small dim", "aria-live": "polite" });
  const area = h("textarea", { id, rows: "3", disabled: true, placeholder: "…", onblur: save, oninput: () => {
    state.textContent = area.value === kept.text ? "" : "Not saved yet";
  } });
  let kept = { text: "", revision: "" };

  function take(answer) {
    kept = answer;
    area.value = answer.text;
    area.disabled = false;
    area.placeholder = "No caption yet";
    state.textContent = "";
  }

  function complain(error) {
    if (!(error instanceof ApiFault)) throw error;
    state.textContent = error.problems.map((one) => one.text).join(" ");
    state.className = "fault small";
  }

  async function load() {
    try {
      take(await get("caption", { path }));
    } catch (error) {
      complain(error);
    }
  }

  async function save() {
    if (area.value === kept.text) return;
    const text = area.value;
    try {
      const answer = await put("caption", { text, revision: kept.revision }, { path });
      kept = { text, revision: answer.revision };
      state.className = "small dim";
      state.textContent = area.value === text ? "Saved" : "Not saved yet";
    } catch (error) {
      if (error instanceof ApiFault && error.status === 409) await settle(text);
      else complain(error);
    }
  }

  async function settle(text) {
    const theirs = await get("caption", { path });
    const choice = await dialog({
      title: `The caption of ${name} was changed outside`,
      body: diffBlock(theirs.text, text),
      actions: [{ label: "Take theirs", value: "theirs" }, { label: "Keep mine", value: "mine", kind: "primary" }],
    });
    kept = theirs;
    if (choice === "mine") await save();
    else if (choice === "theirs") take(theirs);
  }

  return {
    node: h("div", { class: "caption" }, h("label", { for: id, class: "visually-hidden" }, `Caption of ${name}`), area, state),
    load,
  };
}
