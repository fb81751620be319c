/** The report of `simpletuner inspect` on a weight file. */

import { get } from "./api.js";
import { dialog, h, problemPanel } from "./dom.js";
import { count, size, plural } from "./format.js";

const NAMED_AT_MOST = 6;

/** Show the report on the file at `path` in a dialog. */
export async function showReport(path) {
  let body;
  try {
    body = reportView(await get("inspect", { path }));
  } catch (error) {
    body = problemPanel(error);
  }
  await dialog({ title: "File report", body, wide: true, actions: [{ label: "Close", value: null }] });
}

/** @param {{path: string, files: object[]}} inspection */
export const reportView = ({ path, files }) => h("div", { class: "stack" }, files.map((file) => fileView(path, file)));

function fileView(path, { what, bytes, base_model: base, is_distilled: isDistilled, adapter, components, training }) {
  const facts = {
    "Trained from": base,
    Weights: isDistilled === null ? null : isDistilled ? "distilled, judging by the file's name" : "base, judging by the file's name",
    ...(adapter ? adapterFacts(adapter) : {}),
  };
  return h("article", { class: "stack report" },
    h("div", {}, h("p", { class: "path dim" }, path), h("p", {}, h("strong", {}, what), h("span", { class: "dim" }, ` ${size(bytes)}`))),
    listOf(facts),
    adapter?.modules ? h("ul", { class: "plain stack tight" }, Object.entries(adapter.loaders).map(verdict(adapter.modules))) : null,
    components.map(componentView),
    Object.keys(training).length ? folded("Training metadata", listOf(training)) : null,
    adapter?.modules ? folded("Adapted layers", tableOf("Adapted layers", ["Module", "Layers", "Rank"],
      adapter.places.map(({ name, modules, ranks }) => [name, count(modules), ranks.join(", ") || "full"]))) : null,
    adapter?.modules ? folded("How much it changes each block", tableOf("Norms by block", ["Block", "Norm of its change"],
      Object.entries(adapter.norms).map(([name, norm]) => [name, norm.toPrecision(4)]))) : null);
}

function adapterFacts({ kinds, dialect, dtypes, modules, target, parameters, ranks, alphas, fits, unread }) {
  const facts = modules === 0 ? {} : {
    Kind: Object.keys(kinds).join(", "),
    Layout: `${dialect}, ${dtypes.join(", ")}`,
    Adapts: `${plural(modules, "layer")} (${target}), ${count(parameters)} parameters`,
    Rank: counted(ranks) || "full",
    Alpha: counted(alphas),
    Fits: fits.join(", ") || "no FLUX.2: no flavour has layers of these shapes",
  };
  for (const [kind, keys] of Object.entries(unread)) facts[`Not read (${kind})`] = `${plural(keys.length, "key")}: ${named(keys)}`;
  return facts;
}

const verdict = (modules) => ([loader, { refusal, unknown, dropped, wrong }]) => {
  const lost = [
    dropped.length ? `drops ${count(dropped.length)} of ${count(modules)}: ${named(dropped)}` : "",
    wrong.length ? `misreads ${count(wrong.length)}: ${named(wrong)}` : "",
  ].filter(Boolean).join("; ");
  const [kind, word] = refusal ? ["bad", "does not load"] : unknown ? ["warn", "unknown"] : lost ? ["warn", "loads partly"] : ["good", "loads"];
  return h("li", {}, h("strong", {}, loader), " ", h("span", { class: `badge ${kind}` }, word), h("span", { class: "small dim" }, ` ${refusal || unknown || lost}`));
};

function componentView({ component, layout, flavours, sizes, tensors, parameters, formats, problem }) {
  return h("section", { class: "stack tight" },
    h("h3", {}, { transformer: "Transformer", vae: "VAE", text_encoder: "Text encoder" }[component]),
    listOf({
      Layout: `${layout} names, ${plural(tensors, "tensor")}, ${count(parameters)} parameters`,
      Sizes: Object.entries(sizes).map(([name, value]) => `${name} ${value}`).join(", "),
      "Stored as": Object.entries(formats).map(([name, bytes]) => `${name} ${size(bytes)}`).join(", "),
      Fits: flavours.join(", ") || "no flavour of FLUX.2",
    }),
    problem ? h("p", { class: "fault" }, problem) : null);
}

/** A definition list, without pairs whose value is empty or null. */
const listOf = (facts) => h("dl", { class: "facts" }, Object.entries(facts).filter(([, value]) => value)
  .map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));

const folded = (title, body) => h("details", {}, h("summary", {}, title), body);

const tableOf = (label, head, rows) => h("div", { class: "scroll values", tabindex: 0, role: "region", "aria-label": label }, h("table", {},
  h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
  h("tbody", {}, rows.map(([first, ...rest]) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, first)), rest.map((text) => h("td", { class: "numbers" }, text)))))));

const named = (names) => `${names.slice(0, NAMED_AT_MOST).join(", ")}${names.length > NAMED_AT_MOST ? ", …" : ""}`;

/** "16", or "16 (38 times), 32 (5 times)". */
function counted(values) {
  const entries = Object.entries(values).map(([value, times]) => [Number(value), times]);
  return entries.length === 1 ? String(entries[0][0]) : entries.map(([value, times]) => `${value} (${count(times)} times)`).join(", ");
}
