// The gallery, newest first: searched, favourites alone, several selected at once.

import { $, storage, make, press, pressed, notify } from "./dom.js";
import { imagePath, pictureInto, pictureName, fileName } from "./pictures.js";
import { call, fetchBlob } from "./server.js";
import { forget } from "./jobs.js";
import { many, t } from "./words.js";
import { save, zipped } from "./zip.js";

const PAGE = 60;
const MOST_SAVED = 500; // images in one download
export const DRAGGED = "application/x-koala-picture"; // an id, while a tile is dragged
let pictures = []; // as the server sends them, newest first
let view = () => {};
const favourites = new Set(storage.read("favourites") ?? []);
const selected = new Set();
let ended = false; // whether the last page has been loaded

/** Loads the newest images. Images that jobs added stay. `onView(id)` opens one. */
export async function startGallery(onView) {
  view = onView;
  $("older").addEventListener("click", () => complained(more()));
  let typing = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => complained(reload()), 250);
  });
  $("favourites").addEventListener("click", () => {
    press($("favourites"), !pressed($("favourites")));
    complained(reload());
  });
  $("select").addEventListener("click", () => selecting(!pressed($("select"))));
  $("select-all").addEventListener("click", () => {
    for (const { id } of pictures) selected.add(id);
    refresh();
  });
  $("download-selected").addEventListener("click", () => complained(downloadSelected()));
  $("delete-selected").addEventListener("click", () => complained(deleteSelected()));
  await more();
}

const complained = (promise) => promise.catch((error) => notify(error.message));
const filtered = () => Boolean($("search").value.trim()) || pressed($("favourites"));

/** The image with an id, and its neighbours in the list. */
export function neighbours(id) {
  const i = pictures.findIndex((picture) => picture.id === id);
  return i < 0 ? null : { picture: pictures[i], newer: pictures[i - 1], older: pictures[i + 1] };
}

async function reload() {
  pictures = [];
  ended = false;
  $("thumbnails").replaceChildren();
  await more();
}

/** Loads the next page: images older than the last, or the newest. */
async function more() {
  const data = pressed($("favourites")) ? await starred() : await page(pictures.at(-1)?.id);
  const known = new Set(pictures.map(({ id }) => id));
  const next = data.filter(({ id }) => !known.has(id));
  pictures.push(...next);
  $("thumbnails").append(...next.map(thumbnail));
  refresh();
}

async function page(before) {
  const asked = new URLSearchParams({ limit: PAGE });
  if (before) asked.set("before", before);
  if ($("search").value.trim()) asked.set("search", $("search").value.trim());
  const { data } = await call(`v1/gallery?${asked}`);
  ended = data.length < PAGE;
  return data;
}

/** The favourites that are still there and match the search. */
async function starred() {
  ended = true;
  const words = $("search").value.trim().toLowerCase();
  const found = await Promise.all([...favourites].map(async (id) => {
    try {
      return await call(`v1/gallery/${id}`);
    } catch (error) {
      if (error.status === 404) setFavourite(id, false);
      return null;
    }
  }));
  return found.filter((one) => one?.settings.prompt.toLowerCase().includes(words))
    .sort((a, b) => (a.id < b.id ? 1 : -1));
}

/** Adds a finished image in front. */
export function add(picture) {
  if (filtered() || pictures.some(({ id }) => id === picture.id)) return;
  const at = pictures.findIndex(({ id }) => id < picture.id);
  const place = at < 0 ? pictures.length : at;
  $("thumbnails").insertBefore(thumbnail(picture), $("thumbnails").children[place] ?? null);
  pictures.splice(place, 0, picture);
  refresh();
}

/** Adds what was drawn elsewhere. */
export async function look() {
  if (filtered()) return;
  const { data } = await call(`v1/gallery?limit=${PAGE}`);
  const newest = pictures[0]?.id ?? "";
  data.reverse().filter(({ id }) => id > newest).forEach(add);
}

/** Removes an image that was deleted. */
export function drop(id) {
  pictures = pictures.filter((picture) => picture.id !== id);
  $("thumbnails").querySelector(`[data-picture="${id}"]`)?.parentElement.remove();
  selected.delete(id);
  setFavourite(id, false);
  forget(id);
  refresh();
}

function refresh() {
  const none = pictures.length === 0;
  $("gallery").hidden = none && !filtered();
  $("none-found").hidden = !(none && filtered());
  $("older").hidden = ended || none;
  $("welcome").hidden = !$("gallery").hidden || $("jobs").childElementCount > 0;
  const on = pressed($("select"));
  $("selection").hidden = !on;
  $("selected").textContent = many("selected", selected.size);
  for (const id of ["download-selected", "delete-selected"]) $(id).disabled = !selected.size;
  $("delete-selected").textContent = t("delete");
  for (const tile of $("thumbnails").querySelectorAll("button")) {
    const { picture } = tile.dataset;
    if (on) press(tile, selected.has(picture));
    else tile.removeAttribute("aria-pressed");
    tile.classList.toggle("starred", favourites.has(picture));
  }
}

/** Call it when job cards were added or removed. */
export const refreshWelcome = refresh;

function thumbnail(picture) {
  const button = make("button", { type: "button", className: "tile empty" });
  button.dataset.picture = picture.id;
  button.title = picture.settings.prompt;
  button.setAttribute("aria-label", t("view", { picture: pictureName(picture) }));
  button.addEventListener("click", () => {
    if (!pressed($("select"))) return view(picture.id);
    if (!selected.delete(picture.id)) selected.add(picture.id);
    refresh();
  });
  const seen = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting) return;
    seen.disconnect();
    pictureInto(button, picture, true);
  }, { rootMargin: "300px" });
  seen.observe(button);
  const item = make("li", { draggable: true }, button);
  item.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData(DRAGGED, picture.id);
    event.dataTransfer.effectAllowed = "copy";
  });
  return item;
}

// --- favourites and a selection -------------------------------------------------------------

export const isFavourite = (id) => favourites.has(id);

export function setFavourite(id, on) {
  if (on) favourites.add(id);
  else favourites.delete(id);
  storage.write("favourites", [...favourites]);
  refresh();
}

function selecting(on) {
  press($("select"), on);
  selected.clear();
  refresh();
}

async function downloadSelected() {
  const chosen = pictures.filter(({ id }) => selected.has(id)).slice(0, MOST_SAVED);
  notify(many("saving", chosen.length));
  const files = [];
  for (const picture of chosen) {
    const blob = await fetchBlob(imagePath(picture.id));
    files.push([`${picture.id.slice(0, 12)}-${fileName(picture)}`, await blob.arrayBuffer()]);
  }
  save(zipped(files), "koala.zip");
}

async function deleteSelected() {
  if ($("delete-selected").textContent === t("delete")) {
    $("delete-selected").textContent = many("delete-all", selected.size);
    return;
  }
  const chosen = [...selected];
  for (const id of chosen) {
    await removeImage(id);
    drop(id);
  }
  selecting(false);
  notify(many("deleted-many", chosen.length));
}

/** Deletes an image on the server, unless it is gone already. */
export async function removeImage(id) {
  try {
    await call(`v1/gallery/${id}`, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}
