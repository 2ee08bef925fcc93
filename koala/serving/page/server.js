// Calls to the server: the key, errors in plain words, events. Addresses are relative to the
// page's own, so that it also works under a prefix.

/** What the server, or the way to it, says went wrong: a message for people. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // of HTTP; 0 where no answer came
  }
}

const KEY = "koala.key";
let asking = null; // the question for a key that is open: one for all calls that wait for it
let askForKey = async () => null;

/** `ask(wrong)` resolves to a key or null; it is called only when the server wants one. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** JSON of a call. Throws a ServerError. */
export async function call(path, options = {}) {
  const response = await request(path, options);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    throw new ServerError("The server's answer cannot be read.", response.status);
  }
}

/** A picture of a call, as a Blob. */
export async function fetchBlob(path) {
  return (await request(path)).blob();
}

/** A call's answer, once it is a good one. `json` is sent as the body. */
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
      throw new ServerError("The server cannot be reached. Is it running?", 0);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await explained(response);
    if (!(await newKey(key))) throw await explained(response);
  }
}

/** Whether there is another key than `old` now. */
async function newKey(old) {
  if (sessionStorage.getItem(KEY) !== old) return true; // given meanwhile
  asking ??= askForKey(Boolean(old)).finally(() => (asking = null));
  const key = await asking;
  if (!key) return false;
  sessionStorage.setItem(KEY, key);
  return true;
}

async function explained(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // no JSON of ours: the status has to do
  }
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) message += ` (Try again in ${Math.ceil(wait)} s.)`;
  return new ServerError(message, response.status);
}

/** The server-sent events of a path, as {name, data}, until the stream ends. */
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
