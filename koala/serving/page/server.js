// Calls to the server: API key, error messages, events. Paths are relative to the page's own, so
// that it also works under a prefix.

import { t } from "./words.js";

/** An error of the server or the connection, with a message for the user. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // HTTP status; 0 without a response
  }
}

const KEY = "koala.key";
let asking = null; // the open key dialog, shared by all waiting calls
let askForKey = async () => null;

/** Sets `ask(wrong)`, which resolves to a key or null; called when the server needs one. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** The JSON response of a call. Throws a ServerError. */
export async function call(path, options = {}) {
  const response = await request(path, options);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    throw new ServerError(t("unreadable"), response.status);
  }
}

/** The response of a call as a Blob. */
export async function fetchBlob(path) {
  return (await request(path)).blob();
}

/** The successful response of a call. `json` is sent as the body. */
export async function request(path, { json, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (json !== undefined) headers["Content-Type"] = "application/json";
    const body = json === undefined ? undefined : JSON.stringify(json);
    let response;
    try {
      response = await fetch(path, { ...options, headers, body });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(t("unreachable"), 0);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await explained(response);
    if (!(await newKey(key))) throw await explained(response);
  }
}

/** Whether there is now a key other than `old`. */
async function newKey(old) {
  if (sessionStorage.getItem(KEY) !== old) return true; // set meanwhile
  asking ??= askForKey(Boolean(old)).finally(() => (asking = null));
  const key = await asking;
  if (!key) return false;
  sessionStorage.setItem(KEY, key);
  return true;
}

async function explained(response) {
  let message = t("responded", { status: `${response.status} ${response.statusText}`.trim() });
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // not our JSON: use the status
  }
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) message += ` ${t("try-again", { n: Math.ceil(wait) })}`;
  return new ServerError(message, response.status);
}

/** Yields the server-sent events of a path as {name, data}. */
export async function* events(path, signal) {
  const response = await request(path, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = parsed(block);
      if (event) yield event;
    }
  }
}

function parsed(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? { name, data: JSON.parse(data.join("\n")) } : null;
}
