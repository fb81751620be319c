/** Edit the note of a run, and delete a run; shared by the run list and the run's screen. */

import { ApiFault, del, get, put } from "./api.js";
import { confirm, dialog, freshId, h, toast } from "./dom.js";
import { size } from "./format.js";

const LONGEST = 2000;
const CONFLICT = 409;

/** Let the user edit the note of a run. Returns the updated run, or null if the user cancelled. */
export async function editNote({ run, name, note }) {
  let text = note;
  let seen = note;
  let clash = null;
  for (;;) {
    const id = freshId("note");
    const field = h("textarea", { id, rows: 4, maxlength: LONGEST, value: text });
    const answer = await dialog({
      title: `Note on ${name}`,
      body: [
        clash === null ? null : h("div", { class: "panel warn", role: "alert" },
          h("p", {}, "Somebody else changed the note meanwhile. It now says:"), h("p", {}, clash || "(nothing)"),
          h("p", {}, "“Save” replaces it with yours below.")),
        h("label", { for: id }, "Your note; it is saved in the run's folder, and “Find” searches it"), field,
      ],
      actions: [{ label: "Cancel", value: null }, { label: "Save", value: "save", kind: "primary" }],
      opened: () => field.focus(),
    });
    if (answer === null) return null;
    text = field.value;
    try {
      return await put("run/note", { run, text, seen });
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      if (error.status === CONFLICT) clash = seen = (await get("run", { run })).note;
      else toast(error.message, "bad");
    }
  }
}

/** Ask, then delete a run. Returns whether it was deleted. */
export async function deleteRun({ run, name }) {
  try {
    const { bytes, text } = await get("run/contents", { run });
    const question = `${size(bytes)} in ${run}: ${text}. This cannot be undone.`;
    if (!(await confirm(`Delete ${name}?`, question, "Delete", "danger"))) return false;
    await del("run", { run });
  } catch (error) {
    if (!(error instanceof ApiFault)) throw error;
    toast(error.message, "bad");
    return false;
  }
  toast(`${name} was deleted.`, "good");
  return true;
}
