// Client of the server's API. Every error response is thrown as an ApiFault.

/**
 * A problem, as the server reports it.
 * @typedef {{found: string, expected: string, remedy: string, key: string, document: string, text: string}} Problem
 */

/** An error response: its status (0 if the server did not answer) and the problems. */
export class ApiFault extends Error {
  /** @param {number} status @param {Problem[]} problems */
  constructor(status, problems) {
    super(problems.map((problem) => problem.text).join("\n"));
    this.name = "ApiFault";
    this.status = status;
    this.problems = problems;
  }
}

const UNREACHED = "The server does not answer.";
const RESTART = "Is it still running? Start it again with: simpletuner server";

/** @param {string} found @param {string} remedy @returns {Problem} */
export const problem = (found, remedy = "") => ({
  found, expected: "", remedy, key: "", document: "", text: remedy ? `${found} ${remedy}` : found,
});

/** The address of a route: `address("picture", {path, width})`. Null parameters are omitted. */
export function address(path, params = {}) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(params)) {
    if (value !== null && value !== undefined) query.set(key, String(value));
  }
  const text = query.toString();
  return `/api/${path}${text ? `?${text}` : ""}`;
}

/** The error response as an ApiFault. */
function faultOf(status, text) {
  try {
    const { problems } = JSON.parse(text);
    if (Array.isArray(problems) && problems.length) return new ApiFault(status, problems);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  return new ApiFault(status, [problem(`The server answered ${status}.`, text.slice(0, 300))]);
}

async function answerOf(method, path, params, body, signal, keepalive = false) {
  let answer;
  try {
    answer = await fetch(address(path, params), {
      method,
      signal,
      keepalive,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFault(0, [problem(UNREACHED, RESTART)]);
  }
  if (!answer.ok) throw faultOf(answer.status, await answer.text());
  return answer;
}

async function call(...request) {
  const text = await (await answerOf(...request)).text();
  return text === "" ? null : JSON.parse(text);
}

export const get = (path, params = {}, signal = undefined) => call("GET", path, params, undefined, signal);
export const post = (path, body = {}, params = {}, signal = undefined) => call("POST", path, params, body, signal);
/** With `keepalive` the browser completes the request even if the page closes; only for small bodies. */
export const put = (path, body = {}, params = {}, keepalive = false) => call("PUT", path, params, body, undefined, keepalive);
export const del = (path, params = {}) => call("DELETE", path, params);

/**
 * Request a file that the server creates, and download it.
 * @param {string} path @param {object} body @returns {Promise<string[]>} the lines that the command printed about it
 */
export async function downloadCreated(path, body) {
  const answer = await answerOf("POST", path, {}, body);
  saveFile(nameIn(answer.headers.get("Content-Disposition") ?? ""), await answer.blob());
  return JSON.parse(answer.headers.get("X-Said") ?? "[]");
}

/** The file name in a Content-Disposition header; the server encodes names with spaces or non-ASCII characters. */
function nameIn(disposition) {
  const encoded = /filename\*=utf-8''([^;]+)/i.exec(disposition)?.[1];
  return encoded ? decodeURIComponent(encoded) : /filename="([^"]+)"/.exec(disposition)?.[1] ?? "lora.safetensors";
}

/** Download a file from memory. @param {string} name @param {Blob} content */
export function saveFile(name, content) {
  const url = URL.createObjectURL(content);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/**
 * Send a file as the raw body.
 * @param {string} method @param {string} path @param {object} params @param {Blob} file
 * @param {(share: number) => void} [progress] from 0 to 1 @param {AbortSignal} [signal]
 */
export function upload(method, path, params, file, progress = () => {}, signal = undefined) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, address(path, params));
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) progress(event.loaded / event.total);
    });
    request.addEventListener("load", () => {
      if (request.status >= 200 && request.status < 300) resolve(JSON.parse(request.responseText || "null"));
      else reject(faultOf(request.status, request.responseText));
    });
    request.addEventListener("error", () => {
      reject(new ApiFault(0, [problem(UNREACHED, RESTART)]));
    });
    request.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")));
    signal?.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}
