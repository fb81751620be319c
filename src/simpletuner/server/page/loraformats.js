/** Downloads of a LoRA in other programs' formats. */

import { ApiFault, downloadCreated } from "./api.js";
import { button, confirm, freshId, h, toast } from "./dom.js";

const FORMATS = { diffusers: "diffusers", comfyui: "ComfyUI", kohya: "kohya", bfl: "BFL" };
const LOSS_REMEDY = / *Give --allow-loss[^.]*\./;

/** A select of LoRA formats; diffusers is the first. */
export const formatChoice = (label, excluded = []) => h("select", { "aria-label": label },
  Object.entries(FORMATS).filter(([name]) => !excluded.includes(name)).map(([value, text]) => h("option", { value }, text)));

/** A select of the formats other than the file's own, and a button that downloads the LoRA at `path` in the selected one. */
export function formatDownload(path, fileFormat) {
  const choice = formatChoice("Format", [fileFormat]);
  choice.id = freshId("format");
  return h("div", { class: "row nowrap" }, h("label", { class: "small", for: choice.id }, "Other formats"), choice,
    button("Download", () => saveAs(path, choice.value), { icon: "download", label: "Download in this format" }));
}

/** Download the LoRA; if the format's loader would drop layers, ask first. */
async function saveAs(path, format, allowLoss = false) {
  try {
    await downloadCreated("lora/convert", { path, format, allow_loss: allowLoss });
  } catch (error) {
    if (!(error instanceof ApiFault)) throw error;
    const texts = error.problems.map(({ text }) => text);
    if (allowLoss || !texts.some((text) => LOSS_REMEDY.test(text))) {
      toast(texts.join("\n"), "bad");
      return;
    }
    const losses = texts.map((text) => text.replace(LOSS_REMEDY, "")).join(" ");
    if (await confirm("Programs will not load all layers", losses, "Download anyway")) await saveAs(path, format, true);
  }
}
