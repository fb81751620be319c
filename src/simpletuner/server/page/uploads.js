// Bringing files into a folder: by a button or by dropping them, with each one's progress and refusals.

import { ApiFault, upload } from "./api.js";
import { button, h } from "./dom.js";
import { ensureFolder } from "./folders.js";
import { size, some } from "./format.js";

const AT_ONCE = 3;

/**
 * @param {() => string} folder where files go @param {() => void} arrived is called when a batch is through
 * @returns {{node: HTMLElement, take: (files: Iterable<File>) => Promise<void>}} `node` is also where files may be dropped
 */
export function uploads(folder, arrived) {
  const list = h("ul", { class: "plain stack uploads", "aria-live": "polite" });
  const input = h("input", { type: "file", multiple: true, hidden: true, accept: "image/*,.txt,.zip,.avif,.jxl", onchange() {
    take([...input.files]);
    input.value = "";
  } });
  const node = h("div", { class: "drop stack" },
    h("div", { class: "row" },
      button("Add files", () => input.click(), { icon: "upload" }), input,
      h("span", { class: "hint" }, "or drop pictures, caption files (.txt) and zips here")),
    list);

  let depth = 0;
  const carries = (event) => [...event.dataTransfer.types].includes("Files");
  node.addEventListener("dragenter", (event) => {
    if (!carries(event)) return;
    depth += 1;
    node.classList.add("over");
  });
  node.addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (depth === 0) node.classList.remove("over");
  });
  node.addEventListener("dragover", (event) => {
    if (carries(event)) event.preventDefault();
  });
  node.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    node.classList.remove("over");
    take([...event.dataTransfer.files]);
  });

  async function send(file) {
    const bar = h("progress", { max: "1", "aria-label": file.name });
    const words = h("span", { class: "small dim" }, size(file.size));
    const line = h("li", {}, h("div", { class: "row" }, h("span", { class: "grow path" }, file.name), words), bar);
    list.append(line);
    try {
      const { saved, refused } = await upload("PUT", "upload", { folder: folder(), name: file.name }, file, (share) => { bar.value = share; });
      bar.remove();
      words.textContent = saved.length === 0 ? "refused" : saved.length === 1 && refused.length === 0 ? "saved" : `${some(saved.length, "file")} saved`;
      if (refused.length) line.append(h("ul", { class: "fault" }, refused.map(({ name, reason }) => h("li", {}, `${name}: ${reason}`))));
      return { saved: saved.length, refused: refused.length };
    } catch (error) {
      if (!(error instanceof ApiFault)) throw error;
      bar.remove();
      words.textContent = "refused";
      line.append(h("p", { class: "fault" }, error.problems.map((one) => one.text).join(" ")));
      return { saved: 0, refused: 1 };
    }
  }

  async function take(files) {
    list.replaceChildren();
    await ensureFolder(folder().replace(/\/+$/, ""));
    const waiting = [...files];
    const counts = { saved: 0, refused: 0 };
    const work = async () => {
      for (let file = waiting.shift(); file !== undefined; file = waiting.shift()) {
        const { saved, refused } = await send(file);
        counts.saved += saved;
        counts.refused += refused;
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    list.prepend(h("li", { class: counts.refused ? "" : "hint" },
      `${some(counts.saved, "file")} saved${counts.refused ? `, ${counts.refused} refused` : ""}. `, button("Clear this list", () => list.replaceChildren(), { kind: "tiny" })));
    arrived();
  }

  return { node, take };
}
