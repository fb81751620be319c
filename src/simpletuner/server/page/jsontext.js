// JSON as a text with places: where each value stands, and the smallest change of the text that changes a value.

/**
 * A value and where it stands in the text.
 * @typedef {{kind: "object"|"array"|"string"|"number"|"word", start: number, end: number, value: any,
 *   members?: {key: string, start: number, node: Node}[], items?: Node[]}} Node
 */

/** A text that is no JSON, and where. */
export class JsonFault extends Error {
  constructor(text, at, message) {
    super(message);
    this.at = at;
    const before = text.slice(0, at).split("\n");
    this.line = before.length;
    this.column = before[before.length - 1].length + 1;
  }
}

const SPACE = /[ \t\r\n]*/y;
const NUMBER = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const STRING = /"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y;
const WORD = /true|false|null/y;
const WORDS = { true: true, false: false, null: null };

/** Read `text`. @returns {Node} @throws {JsonFault} */
export function read(text) {
  let at = 0;

  const fail = (message, place = at) => {
    throw new JsonFault(text, place, message);
  };
  const match = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found === null) return null;
    at = pattern.lastIndex;
    return found[0];
  };
  const space = () => match(SPACE);

  function list(close, member) {
    at += 1;
    space();
    if (text[at] === close) {
      at += 1;
      return;
    }
    for (;;) {
      member();
      space();
      if (text[at] === close) {
        at += 1;
        return;
      }
      if (text[at] !== ",") fail(at < text.length ? `a comma or ${close} is missing before this` : `it ends without ${close}`);
      const comma = at;
      at += 1;
      space();
      if (text[at] === close) fail("remove this comma", comma);
    }
  }

  function value() {
    const start = at;
    const first = text[at];
    if (first === "{") {
      const members = [];
      const result = {};
      list("}", () => {
        const from = at;
        const raw = match(STRING);
        if (raw === null) fail(text[at] === "'" ? "use double quotes" : "a name in double quotes is missing here");
        const key = JSON.parse(raw);
        if (members.some((other) => other.key === key)) fail(`${key} is given twice`, from);
        space();
        if (text[at] !== ":") fail("a colon is missing here");
        at += 1;
        space();
        const node = value();
        members.push({ key, start: from, node });
        Object.defineProperty(result, key, { value: node.value, enumerable: true });
      });
      return { kind: "object", start, end: at, value: result, members };
    }
    if (first === "[") {
      const items = [];
      list("]", () => items.push(value()));
      return { kind: "array", start, end: at, value: items.map((item) => item.value), items };
    }
    if (first === '"') {
      const raw = match(STRING);
      if (raw === null) fail("this text does not end, or holds a character that must be escaped");
      return { kind: "string", start, end: at, value: JSON.parse(raw) };
    }
    const number = match(NUMBER);
    if (number !== null) return { kind: "number", start, end: at, value: Number(number) };
    const word = match(WORD);
    if (word !== null) return { kind: "word", start, end: at, value: WORDS[word] };
    if (at >= text.length) fail("it ends too early");
    if (first === "'") fail("use double quotes");
    if (first === "/" || first === "#") fail("JSON has no comments: remove this one");
    return fail("this is no JSON value");
  }

  if (text.startsWith("\ufeff")) at = 1;
  space();
  const root = value();
  space();
  if (at < text.length) fail("something follows the end");
  return root;
}

/** The node at a path of names and numbers, or null. */
function nodeAt(root, path) {
  let node = root;
  for (const step of path) {
    const next = node.kind === "object" ? node.members.find((member) => member.key === step)?.node : node.items?.[step];
    if (next === undefined) return null;
    node = next;
  }
  return node;
}

const parts = (node) => (node.kind === "object" ? node.members : node.items.map((item) => ({ start: item.start, node: item })));

/** The blank before the first part of a list, which sets the others apart too; or what fits its depth. */
function blankOf(text, node) {
  const [first] = parts(node);
  if (first !== undefined) return /^\s*/.exec(text.slice(node.start + 1, first.start))[0];
  return `\n${"  ".repeat(depthOf(text, node) + 1)}`;
}

function depthOf(text, node) {
  const line = text.slice(text.lastIndexOf("\n", node.start) + 1, node.start);
  return Math.floor(/^ */.exec(line)[0].length / 2);
}

/** Put `raw` (with its name, for an object) among the parts of a list, before part `index`. */
function insert(text, node, index, raw) {
  const all = parts(node);
  const blank = blankOf(text, node);
  if (all.length === 0) {
    const close = blank.includes("\n") ? `\n${"  ".repeat(depthOf(text, node))}` : "";
    return `${text.slice(0, node.start + 1)}${blank}${raw}${close}${text.slice(node.end - 1)}`;
  }
  if (index >= all.length) {
    const { end } = all[all.length - 1].node;
    return `${text.slice(0, end)},${blank || " "}${raw}${text.slice(end)}`;
  }
  const { start } = all[index];
  return `${text.slice(0, start)}${raw},${blank || " "}${text.slice(start)}`;
}

/** Take part `index` out of a list. */
function cut(text, node, index) {
  const all = parts(node);
  if (all.length === 1) return `${text.slice(0, node.start + 1)}${text.slice(node.end - 1)}`;
  if (index === 0) return `${text.slice(0, all[0].start)}${text.slice(all[1].start)}`;
  return `${text.slice(0, all[index - 1].node.end)}${text.slice(all[index].node.end)}`;
}

/** JSON for a value, laid out as deep as it will stand. */
export function written(value, depth = 0) {
  return JSON.stringify(value, null, 2).replaceAll("\n", `\n${"  ".repeat(depth)}`);
}

/**
 * The text with the value at `path` set to the JSON `raw`, or taken out where `raw` is null. The rest stays byte for byte.
 * A missing member is put at the end of its object.
 */
export function set(text, path, raw) {
  const root = read(text);
  const parent = nodeAt(root, path.slice(0, -1));
  const last = path[path.length - 1];
  const index = parent.kind === "object" ? parent.members.findIndex((member) => member.key === last) : last;
  if (raw === null) return index < 0 ? text : cut(text, parent, index);
  const old = parts(parent)[index];
  if (old !== undefined) return text.slice(0, old.node.start) + raw + text.slice(old.node.end);
  return insert(text, parent, Infinity, parent.kind === "object" ? `${JSON.stringify(last)}: ${raw}` : raw);
}

/** The text with item `from` of the array at `path` moved before item `to` of the others. */
export function move(text, path, from, to) {
  const node = nodeAt(read(text), path);
  const raw = text.slice(node.items[from].start, node.items[from].end);
  const without = cut(text, node, from);
  return insert(without, nodeAt(read(without), path), to, raw);
}

/** The text with the member `from` of the object at `path` named `to`. */
export function renameMember(text, path, from, to) {
  const { members } = nodeAt(read(text), path);
  const member = members.find((one) => one.key === from);
  STRING.lastIndex = member.start;
  STRING.test(text);
  return text.slice(0, member.start) + JSON.stringify(to) + text.slice(STRING.lastIndex);
}
