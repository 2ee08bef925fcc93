// The gallery, newest first, and the viewer of one image with its settings.

import { $, closable, storage, make, press, pressed, notify } from "./dom.js";
import { call, fetchBlob } from "./server.js";
import { address, imagePath, pictureInto, pictureName } from "./pictures.js";
import { setImage } from "./init_image.js";
import { fill } from "./form.js";
import { forget } from "./jobs.js";

const PAGE = 60;
let pictures = []; // as the server sends them, newest first
let viewed = null; // the image in the viewer

/** Loads the newest images and sets up the viewer. Images that jobs added stay. */
export async function startGallery() {
  closable($("viewer"));
  $("older").addEventListener("click", () => {
    more(pictures.at(-1)).catch((error) => notify(error.message));
  });
  $("newer").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  $("viewer").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  $("use").addEventListener("click", () => {
    $("viewer").close();
    fill(viewed.settings, "Its settings are now in the form.");
    toForm($("prompt"));
  });
  $("begin").addEventListener("click", begin);
  $("crisp").addEventListener("click", () => {
    press($("crisp"), !pressed($("crisp")));
    storage.write("crisp", pressed($("crisp")));
    fit();
  });
  press($("crisp"), storage.read("crisp") === true);
  $("delete").addEventListener("click", remove);
  $("viewed").addEventListener("load", fit);
  addEventListener("resize", fit);
  await more(null);
}

/** Loads the next page: images older than `last`, or the newest. */
async function more(last) {
  const { data } = await call(`v1/gallery?limit=${PAGE}${last ? `&before=${last.id}` : ""}`);
  const known = new Set(pictures.map(({ id }) => id));
  const next = data.filter(({ id }) => !known.has(id));
  pictures.push(...next);
  $("thumbnails").append(...next.map(thumbnail));
  $("older").hidden = data.length < PAGE;
  refresh();
}

/** Adds a finished image in front. */
export function add(picture) {
  if (pictures.some(({ id }) => id === picture.id)) return;
  pictures.unshift(picture);
  $("thumbnails").prepend(thumbnail(picture));
  refresh();
}

function refresh() {
  $("gallery").hidden = pictures.length === 0;
  $("welcome").hidden = pictures.length > 0 || $("jobs").childElementCount > 0;
}

/** Call it when job cards were added or removed. */
export const refreshWelcome = refresh;

function thumbnail(picture) {
  const button = make("button", { type: "button", className: "tile empty" });
  button.dataset.picture = picture.id;
  button.title = picture.settings.prompt;
  button.setAttribute("aria-label", `View ${pictureName(picture)}`);
  button.addEventListener("click", () => view(picture.id));
  const seen = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting) return;
    seen.disconnect();
    pictureInto(button, picture, true);
  }, { rootMargin: "300px" });
  seen.observe(button);
  return make("li", {}, button);
}

// --- the viewer -----------------------------------------------------------------------------

/** Opens an image of the gallery. */
export async function view(id) {
  viewed = pictures.find((picture) => picture.id === id);
  if (!viewed) return;
  const { settings } = viewed;
  const place = pictures.indexOf(viewed);
  $("newer").disabled = place === 0;
  $("next").disabled = place === pictures.length - 1;
  $("viewed-prompt").textContent = settings.prompt;
  $("viewed-settings").replaceChildren(...described(settings).flatMap(([name, value]) => [
    make("dt", {}, name), make("dd", {}, String(value)),
  ]));
  $("viewed").alt = pictureName(viewed);
  $("delete").textContent = "Delete";
  if (!$("viewer").open) $("viewer").showModal();
  fit();
  try {
    const url = await address(imagePath(id));
    if (viewed?.id !== id) return;
    $("viewed").src = url;
    $("download").href = url;
    $("download").download = `${slug(settings.prompt)}-${settings.seed}.png`;
  } catch (error) {
    notify(error.message);
  }
}

function described(settings) {
  const rows = [];
  if (settings.negative_prompt) rows.push(["Negative prompt", settings.negative_prompt]);
  rows.push(
    ["Size", `${settings.width} × ${settings.height}`], ["Steps", settings.steps],
    ["Guidance", settings.guidance], ["Seed", settings.seed], ["Scheduler", settings.sampler],
  );
  if (settings.guidance_until < 1) rows.push(["Guidance until", settings.guidance_until]);
  if (settings.image) rows.push(["From an image", `strength ${settings.strength}`]);
  if (settings.mask) rows.push(["Mask", "yes"]);
  for (const [name, scale] of settings.loras ?? []) rows.push(["LoRA", `${name} ${scale}`]);
  rows.push(["Model", settings.model]);
  return rows;
}

/**
 * Sizes the image: small ones are enlarged by an integer, so that all pixels look alike; large
 * ones are scaled to fit. The frame has its size before the image has loaded.
 */
function fit() {
  if (!viewed || !$("viewer").open) return;
  const { width, height } = viewed.settings;
  const box = $("viewed").parentElement.getBoundingClientRect();
  const room = Math.min((box.width - 32) / width, (box.height - 32) / height);
  const scale = room > 1 ? Math.min(Math.floor(room), Math.ceil(768 / Math.max(width, height)))
    : room;
  $("viewed").style.width = `${width * scale}px`;
  $("viewed").style.height = `${height * scale}px`;
  $("viewed").classList.toggle("crisp", pressed($("crisp")) && scale > 1);
  $("crisp").hidden = scale <= 1;
}

function move(by) {
  const next = pictures[pictures.indexOf(viewed) + by];
  if (next) view(next.id);
}

async function begin() {
  const picture = viewed;
  try {
    const blob = await fetchBlob(imagePath(picture.id));
    $("viewer").close();
    await setImage(new File([blob], "picture.png", { type: "image/png" }));
    toForm($("start"));
    notify("The next image starts from this one.");
  } catch (error) {
    notify(error.message);
  }
}

async function remove() {
  if ($("delete").textContent === "Delete") {
    $("delete").textContent = "Delete permanently?";
    return;
  }
  const gone = viewed;
  try {
    await call(`v1/gallery/${gone.id}`, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) return notify(error.message);
  }
  const place = pictures.indexOf(gone);
  pictures = pictures.filter((picture) => picture !== gone);
  $("thumbnails").querySelector(`[data-picture="${gone.id}"]`)?.parentElement.remove();
  forget(gone.id);
  refresh();
  notify("Deleted.");
  const next = pictures[Math.min(place, pictures.length - 1)];
  if (next) view(next.id);
  else $("viewer").close();
}

/** Scrolls to the form if it is out of sight, as on a phone. */
function toForm(part) {
  const { top } = $("form").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("form").scrollIntoView({ behavior: "smooth" });
  part.scrollIntoView({ behavior: "smooth", block: "nearest" });
}

/** A file name from the prompt, as `koala generate` makes it. */
function slug(prompt) {
  const words = prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  return words.slice(0, 48).replace(/-+$/, "") || "picture";
}
