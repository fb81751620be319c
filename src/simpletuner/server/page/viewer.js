/** Show one image of a grid as large as the window allows, with its parameters, neighbors and a comparison. */

import { beforeAfter } from "./slider.js";
import { dialog, h, icon, freshId } from "./dom.js";

/**
 * @typedef {object} Shown An image in a grid.
 * @property {string} src @property {string} file its name for download @property {number} width @property {number} height
 * @property {string} row label of its row @property {string} column label of its column, such as "step 20"
 * @property {Record<string, any>} facts the parameters it was generated with
 */

/**
 * Open the viewer.
 * @param {{rows: number, columns: number, at: (row: number, column: number) => Shown|undefined}} grid
 * @param {number} row @param {number} column the image to show first
 */
export function openViewer(grid, row, column) {
  const body = h("div", { class: "viewer" });
  let comparedColumn = null; // null: the first available column; "none": no comparison
  let box = null;

  const move = (down, right) => {
    let [nextRow, nextColumn] = [row, column];
    do {
      nextRow += down;
      nextColumn += right;
      if (nextRow < 0 || nextColumn < 0 || nextRow >= grid.rows || nextColumn >= grid.columns) return;
    } while (!grid.at(nextRow, nextColumn));
    [row, column] = [nextRow, nextColumn];
    show();
  };

  const show = () => {
    const picture = grid.at(row, column);
    const choices = Array.from({ length: grid.columns }, (_, index) => ({ index, picture: grid.at(row, index) }))
      .filter((one) => one.picture && one.index !== column);
    const against = comparedColumn === "none" ? undefined : (choices.find((one) => one.index === comparedColumn) ?? choices[0]);
    const chooser = freshId("against");
    const select = h("select", {
      id: chooser,
      onchange: () => {
        comparedColumn = select.value === "none" ? "none" : Number(select.value);
        show();
        body.querySelector("select").focus();
      },
    },
    h("option", { value: "none", selected: against === undefined }, "nothing"),
    choices.map((one) => h("option", { value: one.index, selected: one === against }, one.picture.column)));
    const arrow = (text, name, down, right) => h("button", {
      type: "button", class: "quiet square", "aria-label": text, title: text, onclick: () => move(down, right),
    }, icon(name));
    body.style.setProperty("--aspect", picture.width / picture.height);
    body.replaceChildren(
      against
        ? beforeAfter({ src: against.picture.src, label: against.picture.column }, { src: picture.src, label: picture.column }, picture)
        : h("img", { class: "whole", src: picture.src, alt: `${picture.row}, ${picture.column}`, width: picture.width, height: picture.height }),
      h("div", { class: "stack" },
        h("div", { class: "row" },
          arrow("Previous image", "left", 0, -1), arrow("Next image", "right", 0, 1), arrow("Row above", "up", -1, 0), arrow("Row below", "down", 1, 0),
          h("span", { class: "small dim" }, "or the arrow keys")),
        h("div", { class: "row" }, h("label", { for: chooser }, "Compare with"), h("div", { class: "grow" }, select)),
        facts(picture.facts),
        h("a", { class: "button", href: picture.src, download: picture.file }, icon("download"), "Download the image")),
    );
    if (box) box.querySelector("h2").textContent = `${picture.row}, ${picture.column}`;
  };

  show();
  const { row: rowLabel, column: columnLabel } = grid.at(row, column);
  return dialog({
    title: `${rowLabel}, ${columnLabel}`,
    body,
    wide: true,
    actions: [{ label: "Close", value: null }],
    opened(opened) {
      box = opened;
      const focusClose = () => box.querySelector(".actions button").focus({ preventScroll: true });
      box.addEventListener("keydown", (event) => {
        if (event.target.matches("input, select")) return;
        const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
        if (!(event.key in moves)) return;
        event.preventDefault();
        move(...moves[event.key]);
        focusClose();
      });
      focusClose();
    },
  });
}

function facts(values) {
  return h("dl", { class: "facts" },
    Object.entries(values).filter(([, value]) => value !== null && value !== undefined)
      .flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));
}
