// A job's card: previews, progress, place in the queue, a button that cancels.

import { make, announce, notify } from "./dom.js";
import { remember } from "./origins.js";
import { pictureInto, pictureName } from "./pictures.js";
import { call } from "./server.js";
import { many, t } from "./words.js";

export const OVER = ["done", "failed", "cancelled"];

/** `on`: {picture(picture), view(id), change(), dismiss(id)}. */
export class Card {
  constructor(job, nativeSize, on) {
    this.id = job.id;
    this.on = on;
    this.over = this.running = false;
    this.waits = true; // for a stream
    this.origin = null; // what the images start from
    this.number = job.request.n ?? 1;
    this.finished = 0;
    this.build(job.request, nativeSize);
    this.update(job);
  }

  build(request, nativeSize) {
    this.words = make("p", { className: "words", title: request.prompt }, request.prompt);
    this.said = make("p", { className: "said quiet" });
    this.bar = make("progress", { max: 1, value: 0, "aria-label": t("steps-done") });
    this.button = make("button", { type: "button", className: "small" }, t("cancel"));
    this.button.addEventListener("click", () => this.dismiss());
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
    this.run(job.status === "running");
    job.pictures.forEach((picture) => this.picture(picture));
    if (OVER.includes(job.status)) this.end(job.status, job.error?.message, job);
    else this.progress({ ...job.progress, position: job.position });
  }

  run(running) {
    if (this.running === running) return;
    this.running = running;
    this.on.change();
  }

  progress({ done, total, position }) {
    if (this.over) return;
    if (total) this.bar.value = done / total;
    if (done) this.said.textContent = t("steps-of", { done, total });
    else if (position) this.said.textContent = many("queued", position);
    else this.said.textContent = t("starting");
    if (done) this.run(true);
  }

  preview({ index, b64_json: data }) {
    const tile = this.tiles[index];
    if (!tile || tile.dataset.picture) return;
    let image = tile.querySelector("img");
    if (!image) {
      image = make("img", { alt: t("preview"), className: "preview" });
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
    button.setAttribute("aria-label", t("view", { picture: pictureName(picture) }));
    button.append(...tile.childNodes); // the preview stays until the image has loaded
    button.addEventListener("click", () => this.on.view(picture.id));
    tile.replaceWith(button);
    this.tiles[picture.index] = button;
    this.finished++;
    pictureInto(button, picture);
    remember(picture.id, this.origin);
    this.on.picture(picture);
  }

  end(status, message, job) {
    if (this.over) return;
    this.over = true;
    this.waits = this.running = false;
    this.element.classList.add(status);
    this.button.textContent = t("dismiss");
    this.button.disabled = false;
    for (const tile of this.tiles) if (!tile.dataset.picture) tile.remove();
    this.bar.value = status === "done" ? 1 : this.bar.value;
    const took = job?.finished && job.started ? job.finished - job.started : 0;
    const n = took < 10 ? took.toFixed(1) : Math.round(took);
    this.said.textContent = {
      done: took ? t("done-in", { n }) : t("done"), cancelled: t("cancelled"),
      failed: message ?? t("failed"),
    }[status];
    this.said.classList.toggle("error", status === "failed");
    if (status !== "failed") announce(`${this.said.textContent}: ${this.words.textContent}`);
    this.on.change();
    const empty = !this.element.querySelector(".tile");
    if (status === "cancelled" && empty) setTimeout(() => this.on.dismiss(this.id), 4000);
  }

  dismiss() {
    if (this.over) this.on.dismiss(this.id);
    else this.cancel();
  }

  /** Cancels the job, unless it has ended. */
  async cancel() {
    this.button.disabled = true;
    this.said.textContent = t("cancelling");
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
