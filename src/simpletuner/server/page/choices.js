// The three choices that a configuration starts from: model, card and recipe. They fill in options, but keep those that the user set.

import { button, fill, freshId, h } from "./dom.js";
import { shown } from "./field.js";
import { optionsIn, withOption } from "./form.js";
import { size, plural } from "./format.js";
import { read } from "./jsontext.js";

const NO_CARD = "none";
const THIS_MACHINE = "found";

const same = (one, other) => JSON.stringify(one ?? null) === JSON.stringify(other ?? null);

/**
 * @param {object} offer the response of GET /api/recipes
 * @param {Map<string, object>} fields the form's fields by option
 * @param {import("./environment.js").Environment} environment
 * @param {() => void} onMachine called when the machine to plan for changes
 */
export function choicesPanel(offer, fields, environment, onMachine) {
  const hasGpu = offer.gpus.length > 0;
  const embedded = offer.models.find((one) => one.is_embedded);
  const isEmbedded = (name) => offer.models.some((one) => one.name === name && one.is_embedded);
  /** Values that choices filled in, by option; the user did not set them. */
  let filled = new Map();
  let recipe = null;
  /** The choices that `filled` comes from. */
  let applied = { recipe: null, card: "" };
  let lastChoice = null;

  const models = radios("Model", offer.models.map((one) => ({
    value: one.name, title: one.name,
    lines: [one.summary, one.preview ? `For previews: ${one.preview}` : null, [one.is_embedded ? "Nothing to download" : one.download_bytes ? `${size(one.download_bytes)} to download` : null, license(one.license)]],
  })), () => {
    if (!hasGpu && isEmbedded(models.value)) card.value = NO_CARD;
    if (!isEmbedded(models.value) && card.value === NO_CARD) card.value = hasGpu ? THIS_MACHINE : "";
    choose();
  });
  const card = h("select", { id: freshId("card"), onchange() {
    if (card.value === NO_CARD && !isEmbedded(models.value)) models.value = embedded.name;
    choose();
  } },
  hasGpu
    ? h("option", { value: THIS_MACHINE }, `This machine's, ${Math.round(offer.gpus[0].vram_gib)} GB`)
    : h("option", { value: "", disabled: true }, "Choose a card …"),
  h("option", { value: NO_CARD }, "No card: an embedded example model"),
  offer.cards.map((one) => h("option", { value: one.name }, one.name)));
  const cardNote = h("p", { class: "hint", "aria-live": "polite" });
  const recipes = radios("Recipe", [...new Map(offer.recipes.map((one) => [one.name, one])).values()].map((one) => ({
    value: one.name, title: one.title, lines: [one.summary],
  })), () => {
    recipe = recipes.value;
    choose();
  });
  const result = h("section", { class: "sheet stack filled", "aria-label": "Filled in", "aria-live": "polite", hidden: true });

  const node = h("section", { class: "sheet choices-sheet", "aria-labelledby": "choices-title" },
    h("h2", { id: "choices-title", class: "visually-hidden" }, "Model, card and recipe"),
    models.node,
    h("div", { class: "stack choice" }, h("label", { for: card.id }, "Card"), card, cardNote,
      hasGpu ? null : h("p", { class: "hint" }, "This machine has no GPU. You can plan for another machine.")),
    recipes.node);

  /** The chosen recipe for the chosen model; undefined if none is chosen. */
  const chosenRecipe = () => offer.recipes.find((one) => one.name === recipe && one.flavour === models.value && one.needs === "");

  function chosenCard() {
    const name = card.value === THIS_MACHINE ? offer.gpus[0].card : card.value;
    return offer.cards.find((one) => one.name === name);
  }

  /** The values that the choices require, with their sources, by option. */
  function requiredValues() {
    const model = offer.models.find((one) => one.name === models.value);
    const usedCard = model.is_embedded ? undefined : chosenCard();
    const fit = usedCard?.fits[model.name];
    const parts = [
      { options: { model_flavour: model.name }, source: () => "the chosen model" },
      ...[model, chosenRecipe()].filter(Boolean).map(({ options, sources }) => ({ options, source: (option) => sources[option] })),
      ...(fit ? [{ options: fit.options, source: () => `to fit on ${usedCard.name}: ${fit.summary}` }] : []),
    ];
    return new Map(parts.flatMap(({ options, source }) => Object.entries(options).map(([option, value]) => [option, { value, source: source(option) }])));
  }

  function choose() {
    let text = environment.text("config");
    const textOptions = optionsIn(read(text), text);
    // Distilled models are not offered; preselect the model that is trained in their place.
    models.value ??= (offer.models.find((one) => one.preview === textOptions.get("model_flavour")?.value) ?? offer.models[0]).name;
    const required = requiredValues();
    const rows = [];
    lastChoice = { ...applied, filled: new Map(filled), before: text, after: "" };
    const row = (option, to, source, state) => {
      const before = textOptions.get(option);
      rows.push({ option, from: before === undefined ? fields.get(option).default : before.value, raw: before?.raw ?? null, to, source, state });
    };
    const isFilled = (option) => textOptions.has(option) && filled.has(option) && same(filled.get(option), textOptions.get(option).value);
    for (const option of filled.keys()) {
      if (required.has(option)) continue;
      if (isFilled(option)) {
        text = fillIn(text, option, fields.get(option).default, "");
        row(option, fields.get(option).default, "no longer required: back to the default", "set");
      }
      filled.delete(option);
    }
    for (const [option, { value, source }] of required) {
      const from = textOptions.has(option) ? textOptions.get(option).value : fields.get(option).default;
      const isUserSet = textOptions.has(option) && !isFilled(option) && option !== "model_flavour";
      const state = same(from, value) ? "same" : isUserSet ? "kept" : "set";
      row(option, value, source, state);
      if (state === "set") text = fillIn(text, option, value, source);
    }
    applied = { recipe, card: card.value };
    lastChoice.after = text;
    environment.edit("config", text, "choice");
    showResult(rows);
    onMachine();
  }

  /** Return the text with a filled-in value. A default is removed from the text, together with a comment on the old value. */
  function fillIn(text, option, value, source) {
    const isDefault = option !== "model_flavour" && same(value, fields.get(option).default);
    if (isDefault) filled.delete(option);
    else filled.set(option, value);
    const comment = `// ${option}`;
    const isCommented = optionsIn(read(text), text).has(comment);
    const changed = withOption(text, option, isDefault ? null : JSON.stringify(value));
    return isCommented ? withOption(changed, comment, isDefault ? null : JSON.stringify(source)) : changed;
  }

  function take(rows) {
    let text = environment.text("config");
    for (const { option, to, source } of rows) text = fillIn(text, option, to, source);
    environment.edit("config", text, "choice");
    showResult(shownRows.map((row) => (rows.includes(row) ? { ...row, state: "set" } : row)));
  }

  /** Undo the last choice, except for options edited since. */
  function undo() {
    let text = environment.text("config");
    if (text === lastChoice.after) {
      text = lastChoice.before;
    } else {
      const textOptions = optionsIn(read(text), text);
      for (const { option, to, raw, state } of shownRows) {
        const now = textOptions.has(option) ? textOptions.get(option).value : fields.get(option).default;
        if (state === "set" && same(now, to)) text = withOption(text, option, raw);
      }
    }
    ({ filled, recipe } = lastChoice);
    card.value = lastChoice.card;
    applied = { recipe, card: card.value };
    recipes.value = recipe;
    environment.edit("config", text, "choice");
    result.hidden = true;
    onMachine();
  }

  let shownRows = [];

  function showResult(rows) {
    shownRows = rows;
    const of = (state) => rows.filter((row) => row.state === state);
    const [setRows, keptRows, equalRows] = [of("set"), of("kept"), of("same")];
    const tested = chosenRecipe()?.is_tested ?? true;
    result.hidden = setRows.length + keptRows.length === 0;
    result.replaceChildren();
    fill(result,
      h("div", { class: "row" },
        h("p", { class: "grow" }, h("strong", {}, `${plural(setRows.length, "option")} filled in`),
          keptRows.length ? `, ${keptRows.length} of yours kept` : "", equalRows.length ? `, ${equalRows.length} already set` : "", ". Nothing is saved yet.",
          tested ? "" : " This recipe is untested on real weights."),
        keptRows.length ? button(`Replace mine (${keptRows.length})`, () => take(keptRows)) : null,
        button("Undo", undo, { icon: "reset", kind: "quiet" })),
      h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Options and sources" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Option", "Before", "Now", "Source of the value"].map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, [...setRows, ...keptRows, ...equalRows].map((row) => line(row))))));
  }

  function line(row) {
    const { option, from, to, source, state } = row;
    const now = state === "kept"
      ? [h("span", {}, `yours, not ${shown(to)} `), button("Replace", () => take([row]), { kind: "tiny", label: `Replace ${fields.get(option).label} with ${shown(to)}` })]
      : [state === "set" ? h("strong", {}, shown(to)) : shown(to)];
    return h("tr", { class: state },
      h("th", { scope: "row" }, fields.get(option).label, " ", h("code", { class: "key" }, option)),
      h("td", {}, state === "same" ? "" : shown(from)), h("td", {}, now), h("td", { class: "dim" }, source));
  }

  /** Show the state of the text; lock the choices if it is not a JSON object. @param {import("./jsontext.js").Node|null} root */
  function show(root, text) {
    for (const one of [models, recipes]) one.lock(root === null);
    card.disabled = root === null;
    if (root === null) return;
    models.value = optionsIn(root, text).get("model_flavour")?.value ?? fields.get("model_flavour").default;
    for (const name of recipes.values) {
      recipes.needs(name, offer.recipes.find((one) => one.name === name && one.flavour === models.value)?.needs ?? "a model for training");
    }
    if (chosenRecipe() === undefined) recipes.value = null;
    const usedCard = isEmbedded(models.value) ? undefined : chosenCard();
    cardNote.textContent = [
      card.value === THIS_MACHINE ? `${offer.gpus[0].name}.` : "",
      usedCard?.fits[models.value] ? `To fit: ${usedCard.fits[models.value].summary}. Needs ${usedCard.ram_gib} GB of RAM.` : "",
    ].filter(Boolean).join(" ");
  }

  /** Treat the text's values that match a recipe as filled in, so that another choice may replace them. */
  function adopt(root, text) {
    const textOptions = optionsIn(root, text);
    const valueOf = (option) => (textOptions.has(option) ? textOptions.get(option).value : fields.get(option).default);
    models.value = valueOf("model_flavour");
    card.value = hasGpu ? THIS_MACHINE : isEmbedded(models.value) ? NO_CARD : "";
    const matching = offer.recipes.find((one) => one.flavour === models.value && one.needs === ""
      && Object.entries(one.options).every(([option, value]) => same(valueOf(option), value)));
    recipe = matching?.name ?? null;
    recipes.value = recipe;
    applied = { recipe, card: card.value };
    filled = new Map(Object.entries(matching?.options ?? {}).filter(([option]) => textOptions.has(option)));
  }

  function machine() {
    if (card.value === NO_CARD && hasGpu) return { vram_gib: 0, ram_gib: null };
    const size = offer.cards.find((one) => one.name === card.value);
    return { vram_gib: size?.vram_gib ?? null, ram_gib: size?.ram_gib ?? null };
  }

  /** Changes that lengthen a short run to the minimum number of steps for a LoRA; null if none are needed. */
  function longer(steps) {
    const text = environment.text("config");
    const textOptions = optionsIn(read(text), text);
    if (chosenRecipe() === undefined || textOptions.has("max_train_steps") || steps === null || steps >= offer.least_steps) return null;
    const epochs = textOptions.get("num_train_epochs")?.value ?? fields.get("num_train_epochs").default;
    return { num_train_epochs: Math.ceil((epochs * offer.least_steps) / steps) };
  }

  return { node, result, show, adopt, machine, longer };
}

/** A group of radio buttons, each with a title and lines of text. */
function radios(legend, choices, onchange) {
  const name = freshId("choice");
  const items = new Map(choices.map(({ value, title, lines }) => {
    const id = freshId("option");
    const note = h("span", { class: "small" });
    const input = h("input", { type: "radio", name, value, "aria-labelledby": id, "aria-describedby": `${id}-lines`, onchange });
    const node = h("label", { class: "option" }, input, h("span", {}, h("strong", { id }, title),
      h("span", { id: `${id}-lines` }, lines.filter(Boolean).map((parts) => h("span", { class: "small dim" }, joined([parts].flat()))), note)));
    return [value, { input, node, note, needs: "" }];
  }));
  const group = {
    node: h("fieldset", { class: "choice" }, h("legend", {}, legend), [...items.values()].map((item) => item.node)),
    values: [...items.keys()],
    get value() { return [...items.values()].find(({ input }) => input.checked)?.input.value ?? null; },
    set value(value) { for (const { input } of items.values()) input.checked = input.value === value; },
    needs(value, text) {
      const item = items.get(value);
      item.needs = text;
      item.note.textContent = text ? `Needs ${text}.` : "";
      item.node.classList.toggle("missing", text !== "");
      item.input.disabled = text !== "";
    },
    lock(locked) { for (const item of items.values()) item.input.disabled = locked || item.needs !== ""; },
  };
  return group;
}

/** The non-empty `parts`, separated by dots. */
const joined = (parts) => parts.filter(Boolean).flatMap((part, at) => (at ? [" · ", part] : [part]));

/** A license's name, linked to its address if it has one. */
function license(text) {
  const [words, address] = text.split(/,? (?=https:)/);
  return address ? h("a", { href: address, target: "_blank", rel: "noreferrer" }, words) : words;
}
