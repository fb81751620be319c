// The result of scanning a dataset: counts, sizes, and the rejected files with reasons.

import { h } from "./dom.js";
import { count, plural } from "./format.js";

const REJECTED_SHOWN = 500;

/** @param {object} scan one dataset of `simpletuner dataset scan --json` */
export function scanSummary(scan) {
  const rejections = scan.rejections ?? [];
  const times = scan.repeats === 0 ? "once" : `${scan.repeats + 1} times`;
  return h("section", { class: "sheet stack", "aria-label": "Scan result" },
    h("h2", {}, "Scan"),
    h("p", {}, `${plural(scan.pictures, "image")} and ${plural(scan.captions, "caption")}, each image used ${times}: ${plural(scan.visits_per_epoch, "sample")} per epoch.`),
    h("div", { class: "scroll" }, h("table", { class: "sizes" },
      h("caption", { class: "visually-hidden" }, "Training sizes"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Size"), h("th", { scope: "col", class: "number" }, "Images"))),
      h("tbody", {}, scan.buckets.map((one) => h("tr", {}, h("td", { class: "numbers" }, `${one.width}×${one.height}`), h("td", { class: "number" }, count(one.pictures))))))),
    scan.notices?.length ? h("ul", { class: "small" }, scan.notices.map((notice) => h("li", {}, notice))) : null,
    rejections.length === 0
      ? h("p", { class: "hint" }, "No file was left out.")
      : h("details", { open: true }, h("summary", {}, `${plural(rejections.length, "file")} left out: ${Object.entries(scan.rejected).map(([reason, number]) => `${number} ${reason}`).join(", ")}`),
        h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Files left out" }, h("table", { class: "left-out" },
          h("thead", {}, h("tr", {}, ["File", "Reason", "Detail"].map((title) => h("th", { scope: "col" }, title)))),
          h("tbody", {}, rejections.slice(0, REJECTED_SHOWN).map((one) => h("tr", {}, h("td", { class: "path" }, one.name), h("td", {}, one.reason), h("td", {}, one.detail)))))),
        rejections.length > REJECTED_SHOWN ? h("p", { class: "hint" }, `The first ${REJECTED_SHOWN}.`) : null));
}
