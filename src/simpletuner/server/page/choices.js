// The three choices that a configuration begins with: model, card and recipe. They fill in options; what a person has set stays.

import { button, fill, freshId, h } from "./dom.js";
import { shown } from "./field.js";
import { givenOf, withOption } from "./form.js";
import { size, some } from "./format.js";
import { read } from "./jsontext.js";

const NO_CARD = "none";
const FOUND = "found";

const same = (one, other) => JSON.stringify(one ?? null) === JSON.stringify(other ?? null);

/**
 * @param {object} offer as GET /api/recipes gives it
 * @param {Map<string, object>} fields of the form by option
 * @param {import("./environment.js").Environment} environment
 * @param {() => void} onMachine called when the plan is to be for another machine
 */
export function choicesPanel(offer, fields, environment, onMachine) {
  const hasGpu = offer.gpus.length > 0;
  const embedded = offer.models.find((one) => one.is_embedded);
  const isEmbedded = (name) => offer.models.some((one) => one.name === name && one.is_embedded);
  /** Option to the value that a choice filled in: the page's, not the person's. */
  let filled = new Map();
  let recipe = null;
  /** The choices that `filled` belongs to. */
  let applied = { recipe: null, card: "" };
  let lastChoice = null;

  const models = radios("Model", offer.models.map((one) => ({
    value: one.name, title: one.name,
    lines: [one.summary, one.preview ? `For previews: ${one.preview}` : null, [one.is_embedded ? "Nothing to download" : one.download_bytes ? `${size(one.download_bytes)} to download` : null, license(one.license)]],
  })), () => {
    if (!hasGpu && isEmbedded(models.value)) card.value = NO_CARD;
    if (!isEmbedded(models.value) && card.value === NO_CARD) card.value = hasGpu ? FOUND : "";
    choose();
  });
  const card = h("select", { id: freshId("card"), onchange() {
    if (card.value === NO_CARD && !isEmbedded(models.value)) models.value = embedded.name;
    choose();
  } },
  hasGpu
    ? h("option", { value: FOUND }, `This machine's, ${Math.round(offer.gpus[0].vram_gib)} GB`)
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
      hasGpu ? null : h("p", { class: "hint" }, "No GPU was found in this machine. The plan can be made for another one.")),
    recipes.node);

  /** The recipe of the chosen name for the chosen model; undefined where none is chosen. */
  const chosenRecipe = () => offer.recipes.find((one) => one.name === recipe && one.flavour === models.value && one.needs === "");

  function chosenCard() {
    const name = card.value === FOUND ? offer.gpus[0].card : card.value;
    return offer.cards.find((one) => one.name === name);
  }

  /** Option to the value that the choices ask for, and where it comes from. */
  function wanted() {
    const model = offer.models.find((one) => one.name === models.value);
    const onCard = model.is_embedded ? undefined : chosenCard();
    const ofCard = onCard?.fits[model.name];
    const parts = [
      { options: { model_flavour: model.name }, source: () => "the model that was chosen" },
      ...[model, chosenRecipe()].filter(Boolean).map(({ options, sources }) => ({ options, source: (option) => sources[option] })),
      ...(ofCard ? [{ options: ofCard.options, source: () => `to fit on ${onCard.name}: ${ofCard.summary}` }] : []),
    ];
    return new Map(parts.flatMap(({ options, source }) => Object.entries(options).map(([option, value]) => [option, { value, source: source(option) }])));
  }

  function choose() {
    let text = environment.text("config");
    const given = givenOf(read(text), text);
    // A distilled model is no choice here: its base is trained instead.
    models.value ??= (offer.models.find((one) => one.preview === given.get("model_flavour")?.value) ?? offer.models[0]).name;
    const asked = wanted();
    const rows = [];
    lastChoice = { ...applied, filled: new Map(filled), before: text, after: "" };
    const row = (option, to, source, state) => {
      const before = given.get(option);
      rows.push({ option, from: before === undefined ? fields.get(option).default : before.value, raw: before?.raw ?? null, to, source, state });
    };
    const isFilled = (option) => given.has(option) && filled.has(option) && same(filled.get(option), given.get(option).value);
    for (const option of filled.keys()) {
      if (asked.has(option)) continue;
      if (isFilled(option)) {
        text = fillIn(text, option, fields.get(option).default, "");
        row(option, fields.get(option).default, "no longer asked for: the default", "set");
      }
      filled.delete(option);
    }
    for (const [option, { value, source }] of asked) {
      const from = given.has(option) ? given.get(option).value : fields.get(option).default;
      const isOwn = given.has(option) && !isFilled(option) && option !== "model_flavour";
      const state = same(from, value) ? "same" : isOwn ? "kept" : "set";
      row(option, value, source, state);
      if (state === "set") text = fillIn(text, option, value, source);
    }
    applied = { recipe, card: card.value };
    lastChoice.after = text;
    environment.edit("config", text, "choice");
    showResult(rows);
    onMachine();
  }

  /** The text with a value that is the page's; a default is left out. A comment on the old value goes with it. */
  function fillIn(text, option, value, source) {
    const isDefault = option !== "model_flavour" && same(value, fields.get(option).default);
    if (isDefault) filled.delete(option);
    else filled.set(option, value);
    const comment = `// ${option}`;
    const isCommented = givenOf(read(text), text).has(comment);
    const changed = withOption(text, option, isDefault ? null : JSON.stringify(value));
    return isCommented ? withOption(changed, comment, isDefault ? null : JSON.stringify(source)) : changed;
  }

  function take(rows) {
    let text = environment.text("config");
    for (const { option, to, source } of rows) text = fillIn(text, option, to, source);
    environment.edit("config", text, "choice");
    showResult(shownRows.map((row) => (rows.includes(row) ? { ...row, state: "set" } : row)));
  }

  /** Restore what the last choice changed, except what was edited since. */
  function undo() {
    let text = environment.text("config");
    if (text === lastChoice.after) {
      text = lastChoice.before;
    } else {
      const given = givenOf(read(text), text);
      for (const { option, to, raw, state } of shownRows) {
        const now = given.has(option) ? given.get(option).value : fields.get(option).default;
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
    const [set, kept, equal] = [of("set"), of("kept"), of("same")];
    const tested = chosenRecipe()?.is_tested ?? true;
    result.hidden = set.length + kept.length === 0;
    result.replaceChildren();
    fill(result,
      h("div", { class: "row" },
        h("p", { class: "grow" }, h("strong", {}, `${some(set.length, "option")} filled in`),
          kept.length ? `, ${kept.length} of yours kept` : "", equal.length ? `, ${equal.length} already so` : "", ". Nothing is saved yet.",
          tested ? "" : " This recipe is untested on real weights."),
        kept.length ? button(`Replace mine (${kept.length})`, () => take(kept)) : null,
        button("Undo", undo, { icon: "reset", kind: "quiet" })),
      h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Options and sources" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Option", "Before", "Now", "Where the value comes from"].map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, [...set, ...kept, ...equal].map((row) => line(row))))));
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

  /** Show what the text gives. Locked where it is no JSON object. @param {import("./jsontext.js").Node|null} root */
  function show(root, text) {
    for (const one of [models, recipes]) one.lock(root === null);
    card.disabled = root === null;
    if (root === null) return;
    models.value = givenOf(root, text).get("model_flavour")?.value ?? fields.get("model_flavour").default;
    for (const name of recipes.values) {
      recipes.needs(name, offer.recipes.find((one) => one.name === name && one.flavour === models.value)?.needs ?? "a model for training");
    }
    if (chosenRecipe() === undefined) recipes.value = null;
    const ofCard = isEmbedded(models.value) ? undefined : chosenCard();
    cardNote.textContent = [
      card.value === FOUND ? `${offer.gpus[0].name}.` : "",
      ofCard?.fits[models.value] ? `To fit: ${ofCard.fits[models.value].summary}. Wants ${ofCard.ram_gib} GB of RAM.` : "",
    ].filter(Boolean).join(" ");
  }

  /** What stands in the text already, so that another choice may replace it. */
  function adopt(root, text) {
    const given = givenOf(root, text);
    const valueOf = (option) => (given.has(option) ? given.get(option).value : fields.get(option).default);
    models.value = valueOf("model_flavour");
    card.value = hasGpu ? FOUND : isEmbedded(models.value) ? NO_CARD : "";
    const found = offer.recipes.find((one) => one.flavour === models.value && one.needs === ""
      && Object.entries(one.options).every(([option, value]) => same(valueOf(option), value)));
    recipe = found?.name ?? null;
    recipes.value = recipe;
    applied = { recipe, card: card.value };
    filled = new Map(Object.entries(found?.options ?? {}).filter(([option]) => given.has(option)));
  }

  function machine() {
    if (card.value === NO_CARD && hasGpu) return { vram_gib: 0, ram_gib: null };
    const size = offer.cards.find((one) => one.name === card.value);
    return { vram_gib: size?.vram_gib ?? null, ram_gib: size?.ram_gib ?? null };
  }

  /** Changes that lengthen a recipe on few images to the least number of steps; null where nothing is to be changed. */
  function longer(steps) {
    const text = environment.text("config");
    const given = givenOf(read(text), text);
    if (chosenRecipe() === undefined || given.has("max_train_steps") || steps === null || steps >= offer.least_steps) return null;
    const epochs = given.get("num_train_epochs")?.value ?? fields.get("num_train_epochs").default;
    return { num_train_epochs: Math.ceil((epochs * offer.least_steps) / steps) };
  }

  return { node, result, show, adopt, machine, longer };
}

/** A group of radio buttons, each with a title and lines of text. */
function radios(legend, choices, onchange) {
  const name = freshId("choice");
  const made = new Map(choices.map(({ value, title, lines }) => {
    const id = freshId("option");
    const note = h("span", { class: "small" });
    const input = h("input", { type: "radio", name, value, "aria-labelledby": id, "aria-describedby": `${id}-lines`, onchange });
    const node = h("label", { class: "option" }, input, h("span", {}, h("strong", { id }, title),
      h("span", { id: `${id}-lines` }, lines.filter(Boolean).map((parts) => h("span", { class: "small dim" }, joined([parts].flat()))), note)));
    return [value, { input, node, note, needs: "" }];
  }));
  const group = {
    node: h("fieldset", { class: "choice" }, h("legend", {}, legend), [...made.values()].map((one) => one.node)),
    values: [...made.keys()],
    get value() { return [...made.values()].find((one) => one.input.checked)?.input.value ?? null; },
    set value(value) { for (const one of made.values()) one.input.checked = one.input.value === value; },
    needs(value, text) {
      const one = made.get(value);
      one.needs = text;
      one.note.textContent = text ? `Needs ${text}.` : "";
      one.node.classList.toggle("missing", text !== "");
      one.input.disabled = text !== "";
    },
    lock(locked) { for (const one of made.values()) one.input.disabled = locked || one.needs !== ""; },
  };
  return group;
}

/** What is there of `parts`, with dots between. */
const joined = (parts) => parts.filter(Boolean).flatMap((part, at) => (at ? [" · ", part] : [part]));

/** A license; its address becomes a link. */
function license(text) {
  const [words, address] = text.split(/,? (?=https:)/);
  return address ? h("a", { href: address, target: "_blank", rel: "noreferrer" }, words) : words;
}
