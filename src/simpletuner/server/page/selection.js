// Select tiles of a list: by click, a range with Shift, one more with Ctrl or Cmd, or by keyboard.

import { h } from "./dom.js";

/** Events: `change`. */
export class Selection extends EventTarget {
  #names = [];
  #chosen = new Set();
  #anchor = null;

  /** Set the selectable names, in order; others are deselected. */
  offer(names) {
    this.#names = names;
    const selectable = new Set(names);
    this.set([...this.#chosen].filter((name) => selectable.has(name)));
  }

  get size() {
    return this.#chosen.size;
  }

  /** The selected names, in order. */
  get names() {
    return this.#names.filter((name) => this.#chosen.has(name));
  }

  has(name) {
    return this.#chosen.has(name);
  }

  set(names) {
    this.#chosen = new Set(names);
    this.dispatchEvent(new Event("change"));
  }

  all() {
    this.set(this.#names);
  }

  toggle(name) {
    if (!this.#chosen.delete(name)) this.#chosen.add(name);
    this.#anchor = name;
    this.dispatchEvent(new Event("change"));
  }

  /** Select the range from the last clicked name to `name`. */
  extend(name) {
    const from = this.#names.indexOf(this.#anchor ?? name);
    const to = this.#names.indexOf(name);
    this.#anchor ??= name;
    this.set([...this.#chosen, ...this.#names.slice(Math.min(from, to), Math.max(from, to) + 1)]);
  }

  /** The checkbox of a tile. */
  box(name) {
    const box = h("input", {
      type: "checkbox", class: "pick", "aria-label": `Select ${name}`, checked: this.has(name), dataset: { pick: name },
      onclick: (event) => {
        if (event.shiftKey) this.extend(name);
        else this.toggle(name);
      },
    });
    return box;
  }

  /** Keep the boxes in `area` up to date and handle its keys: arrows, Shift with arrows, Ctrl+A, Escape. @param {HTMLElement} area */
  attach(area) {
    const boxes = () => [...area.querySelectorAll("[data-pick]")];
    this.addEventListener("change", () => {
      for (const box of boxes()) box.checked = this.has(box.dataset.pick);
    });
    area.addEventListener("keydown", (event) => {
      if (event.target.matches("textarea")) return;
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a") this.all();
      else if (event.key === "Escape" && this.size > 0) this.set([]);
      else {
        const list = boxes();
        const at = list.indexOf(event.target);
        const next = at < 0 ? undefined : list[at + step(event.key, list)];
        if (next === undefined || next === event.target) return;
        if (event.shiftKey) {
          if (!this.has(event.target.dataset.pick)) this.toggle(event.target.dataset.pick);
          this.extend(next.dataset.pick);
        }
        next.focus();
      }
      event.preventDefault();
    });
  }
}

/** Index offset of an arrow key in a grid of boxes. */
function step(key, boxes) {
  const top = (box) => Math.round(box.getBoundingClientRect().top);
  const columns = boxes.filter((box) => top(box) === top(boxes[0])).length;
  return { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key] ?? 0;
}
