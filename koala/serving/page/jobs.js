// The jobs of the server: a card each, running ones first, then finished ones; those that wait are
// folded. Jobs live on the server, so they survive a reload and a lost connection.

import { $, make, notify } from "./dom.js";
import { Card, OVER } from "./card.js";
import { call, events, ServerError } from "./server.js";
import { t, many } from "./words.js";

const STREAMS = 2; // browsers open six connections to a server, over all their tabs
const TICK = 1500; // milliseconds between polls of the jobs without a stream
const ELSEWHERE = 3; // ticks between looks for what other tabs and programs draw
const cards = new Map(); // id -> Card
const groups = []; // of jobs that are shown elsewhere: {has(id), update(job), open(), cancel()}
let streaming = 0;
let handlers = {};
let nativeSize = 64;

/** Finds the open jobs. `on`: {picture(picture, job), view(id), tick()} are callbacks. */
export async function startJobs(side, on) {
  [nativeSize, handlers] = [side, { ...on, change: arrange, dismiss: remove }];
  $("cancel-all").addEventListener("click", cancelAll);
  await poll();
  let ticks = 0;
  const look = () => {
    ticks++;
    const elsewhere = ticks % ELSEWHERE === 0;
    if (document.hidden) return;
    if (elsewhere || unfollowed()) poll().catch(() => {});
    if (elsewhere) on.tick();
  };
  setInterval(look, TICK);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    poll().catch(() => {});
    on.tick();
  });
}

const unfollowed = () =>
  [...cards.values()].some((card) => card.waits) || groups.some((group) => group.open());

/** A group of jobs that gets their updates, in place of cards. */
export function addGroup(group) {
  groups.push(group);
}

/** Fetches recent jobs: adds cards for new ones, updates those without a stream. */
async function poll() {
  const { data } = await call("v1/jobs?limit=60");
  for (const job of data.reverse()) {
    const group = groups.find((each) => each.has(job.id));
    const card = cards.get(job.id);
    if (group) group.update(job);
    else if (card?.waits) card.update(job);
    else if (!card && !OVER.includes(job.status)) show(job);
  }
  arrange();
}

/** Submits a job and shows its card. `origin`: what it starts from (`origins.js`). */
export async function draw(fields, origin = null) {
  const job = await call("v1/jobs", { method: "POST", json: fields });
  for (const [id, card] of cards) if (card.over) remove(id);
  const card = show(job);
  card.origin = origin;
  return card.element;
}

function show(job) {
  const card = new Card(job, nativeSize, handlers);
  cards.set(job.id, card);
  arrange();
  fillStreams();
  return card;
}

function remove(id) {
  cards.get(id)?.element.remove();
  cards.delete(id);
  arrange();
}

/** Removes a deleted image from the cards, and cards without images. */
export function forget(pictureId) {
  for (const [id, card] of cards) {
    card.element.querySelector(`[data-picture="${pictureId}"]`)?.remove();
    if (card.over && !card.element.querySelector(".tile")) remove(id);
  }
}

/** Puts every card in its place, and says what the queue holds. */
function arrange() {
  const all = [...cards.values()];
  const open = all.filter((card) => !card.over);
  const running = open.filter((card) => card.running);
  const queued = open.filter((card) => !card.running);
  if (running.length === 0 && queued.length) running.push(queued.shift());
  const over = all.filter((card) => card.over).reverse();
  settle($("jobs"), [...running, ...over].map((card) => card.element));
  settle($("waiting-list"), queued.map((card) => card.element));
  $("waiting").hidden = queued.length === 0;
  $("waiting").firstElementChild.textContent = many("waiting", queued.length);
  const images = open.reduce((sum, card) => sum + card.number - card.finished, 0);
  const inGroups = groups.reduce((sum, group) => sum + group.open(), 0);
  $("queue").hidden = open.length < 2 && inGroups === 0;
  $("queue-text").textContent = many("queue-text", images + inGroups);
  const done = open.reduce((sum, card) => sum + card.bar.value, 0) / open.length;
  document.title = open.length ? `${Math.round(100 * done)} % · koala` : "koala";
}

/** Makes the elements the children of a container, moving only those out of place. */
function settle(container, elements) {
  for (const child of [...container.children]) if (!elements.includes(child)) child.remove();
  elements.forEach((element, i) => {
    if (container.children[i] !== element) container.insertBefore(element, container.children[i]);
  });
}

async function cancelAll() {
  $("cancel-all").disabled = true;
  const open = [...cards.values()].filter((card) => !card.over).reverse(); // the last ones first
  try {
    await Promise.all([...groups.map((group) => group.cancel()), ...open.map((c) => c.cancel())]);
    notify(t("all-cancelled"));
  } finally {
    $("cancel-all").disabled = false;
  }
}

/** Assigns free streams to the oldest jobs, which run first. */
function fillStreams() {
  for (const card of cards.values()) {
    if (streaming >= STREAMS) return;
    if (card.waits) follow(card);
  }
}

async function follow(card) {
  streaming++;
  card.waits = false;
  for (let pause = 500; !card.over; pause = Math.min(2 * pause, 10_000)) {
    try {
      for await (const { name, data } of events(`v1/jobs/${card.id}/events`)) {
        card.take(name, data);
        pause = 500;
        if (card.over) break;
      }
    } catch (error) {
      if (error instanceof ServerError && error.status >= 400 && error.status < 500) {
        card.end("failed", error.message);
        break;
      }
    }
    if (card.over) break;
    if (pause > 500) card.said.textContent = t("reconnecting");
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  streaming--;
  fillStreams();
}
