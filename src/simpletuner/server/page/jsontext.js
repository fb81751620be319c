// JSON as text with positions: find each value, and change a value with the smallest edit of the text.

/**
 * A value and its position in the text.
 * @typedef {{kind: "object"|"array"|"string"|"number"|"word", start: number, end: number, value: any,
 *   members?: {key: string, start: number, node: Node}[], items?: Node[]}} Node
 */

/** A syntax error and its position. */
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

/** Parse `text`. @returns {Node} @throws {JsonFault} */
export function read(text) {
  let at = 0;

  const fail = (message, position = at) => {
    throw new JsonFault(text, position, message);
  };
  const match = (pattern) => {
    pattern.lastIndex = at;
    const result = pattern.exec(text);
    if (result === null) return null;
    at = pattern.lastIndex;
    return result[0];
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
        if (members.some((other) => other.key === key)) fail(`${key} occurs twice`, from);
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
      if (raw === null) fail("this string is not closed, or contains a character that must be escaped");
      return { kind: "string", start, end: at, value: JSON.parse(raw) };
    }
    const number = match(NUMBER);
    if (number !== null) return { kind: "number", start, end: at, value: Number(number) };
    const word = match(WORD);
    if (word !== null) return { kind: "word", start, end: at, value: WORDS[word] };
    if (at >= text.length) fail("the text ends too early");
    if (first === "'") fail("use double quotes");
    if (first === "/" || first === "#") fail("JSON has no comments: remove this one");
    return fail("this is not a JSON value");
  }

  if (text.startsWith("\ufeff")) at = 1;
  space();
  const root = value();
  space();
  if (at < text.length) fail("the JSON ends before this");
  return root;
}

/** The node at a path of keys and indexes, or null. */
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

/** The whitespace before the first part of a list, used between all parts; for an empty list, derived from its depth. */
function blankOf(text, node) {
  const [first] = parts(node);
  if (first !== undefined) return /^\s*/.exec(text.slice(node.start + 1, first.start))[0];
  return `\n${"  ".repeat(depthOf(text, node) + 1)}`;
}

function depthOf(text, node) {
  const line = text.slice(text.lastIndexOf("\n", node.start) + 1, node.start);
  return Math.floor(/^ */.exec(line)[0].length / 2);
}

/** Insert `raw` (for an object, with its key) into a list, before part `index`. */
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

/** Remove part `index` from a list. */
function cut(text, node, index) {
  const all = parts(node);
  if (all.length === 1) return `${text.slice(0, node.start + 1)}${text.slice(node.end - 1)}`;
  if (index === 0) return `${text.slice(0, all[0].start)}${text.slice(all[1].start)}`;
  return `${text.slice(0, all[index - 1].node.end)}${text.slice(all[index].node.end)}`;
}

/** JSON of a value, indented for `depth`. */
export function indentedJson(value, depth = 0) {
  return JSON.stringify(value, null, 2).replaceAll("\n", `\n${"  ".repeat(depth)}`);
}

/**
 * Return the text with the value at `path` set to the JSON `raw`, or removed if `raw` is null. All other bytes stay the
 * same. A missing member is added at the end of its object.
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

/** Return the text with item `from` of the array at `path` moved before item `to` of the others. */
export function move(text, path, from, to) {
  const node = nodeAt(read(text), path);
  const raw = text.slice(node.items[from].start, node.items[from].end);
  const without = cut(text, node, from);
  return insert(without, nodeAt(read(without), path), to, raw);
}

/** Return the text with the member `from` of the object at `path` renamed to `to`. */
export function renameMember(text, path, from, to) {
  const { members } = nodeAt(read(text), path);
  const member = members.find((one) => one.key === from);
  STRING.lastIndex = member.start;
  STRING.test(text);
  return text.slice(0, member.start) + JSON.stringify(to) + text.slice(STRING.lastIndex);
}
