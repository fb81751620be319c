// Two pictures on top of each other, with an edge between them that moves.

import { freshId, h } from "./dom.js";

/**
 * @param {{src: string, label: string}} before shown left of the edge
 * @param {{src: string, label: string}} after shown right of it
 * @param {{width: number, height: number}} size of both, in pixels
 */
export function beforeAfter(before, after, size) {
  const id = freshId("edge");
  const left = h("img", { src: before.src, alt: before.label, width: size.width, height: size.height });
  const right = h("img", { src: after.src, alt: after.label, width: size.width, height: size.height });
  const edge = h("span", { class: "edge", "aria-hidden": "true" });
  const place = () => {
    const share = Number(range.value);
    left.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    edge.style.left = `${share}%`;
    range.setAttribute("aria-valuetext", `${Math.round(share)} % ${before.label}, the rest ${after.label}`);
  };
  // The range lies over the pictures, so that pointers, touch and arrow keys need no code of their own.
  const range = h("input", { type: "range", id, min: 0, max: 100, step: 0.5, value: 50, oninput: place });
  place();
  const node = h("div", { class: "before-after" },
    h("div", { class: "pair" }, right, left, edge, range),
    h("div", { class: "row ends small" },
      h("span", {}, before.label), h("label", { class: "dim", for: id }, "Move the edge"), h("span", {}, after.label)));
  node.style.setProperty("--aspect", size.width / size.height);
  return node;
}
