// Two images on top of each other, with a movable edge between them.

import { freshId, h } from "./dom.js";

/**
 * @param {{src: string, label: string}} before image left of the edge
 * @param {{src: string, label: string}} after image right of the edge
 * @param {{width: number, height: number}} size of both, in pixels
 */
export function beforeAfter(before, after, size) {
  const id = freshId("edge");
  const left = h("img", { src: before.src, alt: before.label, width: size.width, height: size.height });
  const right = h("img", { src: after.src, alt: after.label, width: size.width, height: size.height });
  const edge = h("span", { class: "edge", "aria-hidden": "true" });
  const moveEdge = () => {
    const share = Number(range.value);
    left.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    edge.style.left = `${share}%`;
    range.setAttribute("aria-valuetext", `${Math.round(share)} % ${before.label}, the rest ${after.label}`);
  };
  // A range input over the images handles pointers, touch and arrow keys.
  const range = h("input", { type: "range", id, min: 0, max: 100, step: 0.5, value: 50, oninput: moveEdge });
  moveEdge();
  const node = h("div", { class: "before-after" },
    h("div", { class: "pair" }, right, left, edge, range),
    h("div", { class: "row ends small" },
      h("span", {}, before.label), h("label", { class: "dim", for: id }, "Move the edge"), h("span", {}, after.label)));
  node.style.setProperty("--aspect", size.width / size.height);
  return node;
}
