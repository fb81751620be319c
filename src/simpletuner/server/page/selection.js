// Selecting many of a list of tiles: by click, with Shift a range, with Ctrl or Cmd one more; by keyboard as well.

import { h } from "./dom.js";

/** Events: `change`. */
export class Selection extends EventTarget {
  #names = [];
  #chosen = new Set();
  #anchor = null;

  /** What can be selected, in order; what is no longer there is no longer selected. */
  offer(names) {
    this.#names = names;
    const there = new Set(names);
    this.set([...this.#chosen].filter((name) => there.has(name)));
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

  /** Select all from the one that was touched last up to `name`. */
  extend(name) {
    const from = this.#names.indexOf(this.#anchor ?? name);
    const to = this.#names.indexOf(name);
    this.#anchor ??= name;
    this.set([...this.#chosen, ...this.#names.slice(Math.min(from, to), Math.max(from, to) + 1)]);
  }

  /** The checkbox of a tile. It shows the state of `name` until `node` is gone. */
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

  /** Keep the boxes below `area` in step and take its keys: arrows, Shift with arrows, Ctrl+A, Escape. @param {HTMLElement} area */
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

/** How far an arrow goes in a grid of boxes. */
function step(key, boxes) {
  const top = (box) => Math.round(box.getBoundingClientRect().top);
  const columns = boxes.filter((box) => top(box) === top(boxes[0])).length;
  return { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key] ?? 0;
}
