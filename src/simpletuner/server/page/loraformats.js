/** A LoRA in the format that another program wants. */

import { ApiFault, saveMade } from "./api.js";
import { button, confirm, freshId, h, toast } from "./dom.js";

const FORMATS = { diffusers: "diffusers", comfyui: "ComfyUI", kohya: "kohya", bfl: "BFL" };
const LOSS_REMEDY = / *Give --allow-loss[^.]*\./;

/** A choice of formats, diffusers' first. */
export const formatChoice = (label, leftOut = []) => h("select", { "aria-label": label },
  Object.entries(FORMATS).filter(([name]) => !leftOut.includes(name)).map(([value, text]) => h("option", { value }, text)));

/** A choice of the formats other than the file's `own`, and a button that downloads the LoRA at `path` in it. */
export function formatDownload(path, own) {
  const choice = formatChoice("Format", [own]);
  choice.id = freshId("format");
  return h("div", { class: "row nowrap" }, h("label", { class: "small", for: choice.id }, "Other formats"), choice,
    button("Download", () => saveAs(path, choice.value), { icon: "download", label: "Download in this format" }));
}

/** Where a program would leave layers out, say so and ask first. */
async function saveAs(path, format, allowLoss = false) {
  try {
    await saveMade("lora/convert", { path, format, allow_loss: allowLoss });
  } catch (error) {
    if (!(error instanceof ApiFault)) throw error;
    const texts = error.problems.map(({ text }) => text);
    if (allowLoss || !texts.some((text) => LOSS_REMEDY.test(text))) {
      toast(texts.join("\n"), "bad");
      return;
    }
    const said = texts.map((text) => text.replace(LOSS_REMEDY, "")).join(" ");
    if (await confirm("Not all of it will be loaded", said, "Download all the same")) await saveAs(path, format, true);
  }
}
