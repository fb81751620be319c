// The line differences of two texts.

import { h } from "./dom.js";

/** @returns {{sign: " "|"-"|"+", text: string}[]} "-": in `before` only; "+": in `after` only */
function lineDiff(before, after) {
  const a = before.split("\n");
  const b = after.split("\n");
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head += 1;
  let tail = 0;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail += 1;
  const left = a.slice(head, a.length - tail);
  const right = b.slice(head, b.length - tail);

  // common[i][j]: length of the longest common subsequence of left[i…] and right[j…].
  const common = Array.from({ length: left.length + 1 }, () => new Uint32Array(right.length + 1));
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      common[i][j] = left[i] === right[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  const lines = a.slice(0, head).map((text) => ({ sign: " ", text }));
  let i = 0;
  let j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) {
      lines.push({ sign: " ", text: left[i] });
      i += 1;
      j += 1;
    } else if (j >= right.length || (i < left.length && common[i + 1][j] >= common[i][j + 1])) {
      lines.push({ sign: "-", text: left[i] });
      i += 1;
    } else {
      lines.push({ sign: "+", text: right[j] });
      j += 1;
    }
  }
  return [...lines, ...a.slice(a.length - tail).map((text) => ({ sign: " ", text }))];
}

const CONTEXT_LINES = 3;

/** The differences of two texts as a block, with a few lines of context. */
export function diffBlock(before, after) {
  const lines = lineDiff(before, after);
  const near = lines.map((_, at) => lines.slice(Math.max(0, at - CONTEXT_LINES), at + CONTEXT_LINES + 1).some(({ sign }) => sign !== " "));
  const shown = [];
  lines.forEach((line, at) => {
    if (near[at]) shown.push(h("span", { class: { "-": "lost", "+": "gained", " ": "same" }[line.sign] }, `${line.sign} ${line.text}\n`));
    else if (at === 0 || near[at - 1]) shown.push(h("span", { class: "same dim" }, "  …\n"));
  });
  return h("pre", { class: "diff", tabindex: "0" }, shown);
}
