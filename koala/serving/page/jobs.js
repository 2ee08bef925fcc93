// The open jobs: a card each with previews, progress, queue position and a cancel button.
// The jobs live on the server, so they survive a reload and a lost connection.

import { $, make, announce, notify } from "./dom.js";
import { call, events, ServerError } from "./server.js";
import { pictureInto, pictureName } from "./pictures.js";

const STREAMS = 2; // browsers open six connections to a server, over all their tabs
const POLL = 1500; // milliseconds between polls of the jobs without a stream
const OVER = ["done", "failed", "cancelled"];
const cards = new Map(); // id -> Card
let streaming = 0;
let drawn = () => {};
let view = () => {};
let nativeSize = 64;

/** Finds the open jobs. `onPicture(picture)` and `onView(id)` are callbacks. */
export async function startJobs(side, onPicture, onView) {
  [nativeSize, drawn, view] = [side, onPicture, onView];
  await poll();
  setInterval(() => {
    if (!document.hidden && [...cards.values()].some((card) => card.waits)) poll().catch(() => {});
  }, POLL);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) poll().catch(() => {});
  });
}

/** Fetches recent jobs: adds cards for new ones, updates those without a stream. */
async function poll() {
  const { data } = await call("v1/jobs?limit=50");
  for (const job of data.reverse()) {
    const card = cards.get(job.id);
    if (card) {
      if (card.waits) card.update(job);
    } else if (!OVER.includes(job.status)) show(job);
  }
}

/** Submits a job and shows its card. */
export async function draw(fields) {
  const job = await call("v1/jobs", { method: "POST", json: fields });
  for (const [id, card] of cards) if (card.over) remove(id);
  return show(job).element;
}

function show(job) {
  const card = new Card(job);
  cards.set(job.id, card);
  $("jobs").prepend(card.element);
  fillStreams();
  return card;
}

function remove(id) {
  cards.get(id)?.element.remove();
  cards.delete(id);
}

/** Removes a deleted image from the cards, and cards without images. */
export function forget(pictureId) {
  for (const [id, card] of cards) {
    card.element.querySelector(`[data-picture="${pictureId}"]`)?.remove();
    if (card.over && !card.element.querySelector(".tile")) remove(id);
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
    if (pause > 500) card.said.textContent = "Connection lost, reconnecting";
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  streaming--;
  fillStreams();
}

// --- a card ---------------------------------------------------------------------------------

class Card {
  constructor(job) {
    this.id = job.id;
    this.over = false;
    this.waits = true; // for a stream
    this.number = job.request.n ?? 1;
    this.build(job.request);
    this.update(job);
  }

  build(request) {
    this.words = make("p", { className: "words", title: request.prompt }, request.prompt);
    this.said = make("p", { className: "said quiet" });
    this.bar = make("progress", { max: 1, value: 0, "aria-label": "Steps done" });
    this.button = make("button", { type: "button", className: "small" }, "Cancel");
    this.button.addEventListener("click", () => this.cancel());
    const [width, height] = (request.size ?? `${nativeSize}x${nativeSize}`).split("x").map(Number);
    this.tiles = Array.from({ length: this.number }, () => {
      const tile = make("div", { className: "tile empty" });
      tile.style.aspectRatio = `${width} / ${height}`;
      return tile;
    });
    const grid = make("div", { className: "tiles" }, ...this.tiles);
    grid.style.setProperty("--columns", columns(this.number));
    grid.style.setProperty("--rows", Math.ceil(this.number / columns(this.number)));
    grid.style.setProperty("--shape", width / height);
    const text = make("div", { className: "text" }, this.words, this.said);
    const head = make("div", { className: "head" }, text, this.button);
    this.element = make("article", { className: "card job", "data-job": this.id }, head, this.bar,
      grid);
  }

  /** Handles one event of the server. */
  take(name, data) {
    if (name === "status" || name === "end") this.update(data);
    else if (name === "progress") this.progress(data);
    else if (name === "preview") this.preview(data);
    else if (name === "picture") this.picture(data.picture ?? data);
  }

  update(job) {
    job.pictures.forEach((picture) => this.picture(picture));
    if (OVER.includes(job.status)) this.end(job.status, job.error?.message, job);
    else this.progress({ ...job.progress, position: job.position });
  }

  progress({ done, total, position }) {
    if (this.over) return;
    if (total) this.bar.value = done / total;
    const ahead = position === 1 ? "1 image" : `${position} images`;
    if (done) this.said.textContent = `${done} of ${total} steps`;
    else if (position) this.said.textContent = `Queued, ${ahead} ahead`;
    else this.said.textContent = "Starting";
    title();
  }

  preview({ index, b64_json: data }) {
    const tile = this.tiles[index];
    if (!tile || tile.dataset.picture) return;
    let image = tile.querySelector("img");
    if (!image) {
      image = make("img", { alt: "Preview", className: "preview" });
      tile.replaceChildren(image);
      tile.classList.remove("empty");
    }
    image.src = `data:image/${data.startsWith("UklGR") ? "webp" : "png"};base64,${data}`;
  }

  picture(picture) {
    const tile = this.tiles[picture.index];
    if (!tile || tile.dataset.picture) return;
    const button = make("button", { type: "button", className: "tile" });
    button.dataset.picture = picture.id;
    button.style.aspectRatio = `${picture.settings.width} / ${picture.settings.height}`;
    button.setAttribute("aria-label", `View ${pictureName(picture)}`);
    button.append(...tile.childNodes); // the preview stays until the image has loaded
    button.addEventListener("click", () => view(picture.id));
    tile.replaceWith(button);
    this.tiles[picture.index] = button;
    pictureInto(button, picture);
    drawn(picture);
  }

  end(status, message, job) {
    if (this.over) return;
    this.over = true;
    this.waits = false;
    this.element.classList.add(status);
    this.button.textContent = "Dismiss";
    this.button.disabled = false;
    for (const tile of this.tiles) if (!tile.dataset.picture) tile.remove();
    this.bar.value = status === "done" ? 1 : this.bar.value;
    const seconds = job?.finished && job.started ? job.finished - job.started : 0;
    const took = seconds ? ` in ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s` : "";
    this.said.textContent = {
      done: `Done${took}`, cancelled: "Cancelled", failed: message ?? "Failed.",
    }[status];
    this.said.classList.toggle("error", status === "failed");
    if (status !== "failed") announce(`${this.said.textContent}: ${this.words.textContent}`);
    title();
    const empty = !this.element.querySelector(".tile");
    if (status === "cancelled" && empty) setTimeout(() => remove(this.id), 4000);
  }

  async cancel() {
    if (this.over) return remove(this.id);
    this.button.disabled = true;
    this.said.textContent = "Cancelling";
    try {
      this.update(await call(`v1/jobs/${this.id}/cancel`, { method: "POST" }));
    } catch (error) {
      notify(error.message);
      this.button.disabled = false;
    }
  }
}

/** The columns of a roughly square grid of n. */
const columns = (n) => (n === 3 ? 3 : Math.ceil(Math.sqrt(n)));

/** Shows the progress of all jobs in the page's title. */
function title() {
  const open = [...cards.values()].filter((card) => !card.over);
  const done = open.reduce((sum, card) => sum + card.bar.value, 0) / open.length;
  document.title = open.length ? `${Math.round(100 * done)} % · koala` : "koala";
}
