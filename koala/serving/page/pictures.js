// Images of the server: fetched with the API key, shown as object URLs.

import { make } from "./dom.js";
import { fetchBlob } from "./server.js";
import { t } from "./words.js";

const urls = new Map(); // path -> promise of an object URL
const MOST = 400; // images kept in memory

/** A URL for an <img>; each image is fetched once. */
export function address(path) {
  if (!urls.has(path)) {
    const url = fetchBlob(path).then((blob) => URL.createObjectURL(blob));
    url.catch(() => urls.delete(path));
    urls.set(path, url);
    if (urls.size > MOST) drop(urls.keys().next().value);
  }
  return urls.get(path);
}

function drop(path) {
  const url = urls.get(path);
  urls.delete(path);
  url.then((old) => URL.revokeObjectURL(old), () => {});
}

export const imagePath = (id) => `v1/gallery/${id}/image`;
const thumbnailPath = (id) => `v1/gallery/${id}/thumbnail`;

/** A label for an image. */
export const pictureName = ({ settings }) => 
  t("picture", { prompt: settings.prompt, seed: settings.seed });

/** Replaces an element's content by an image once it has loaded. */
export async function pictureInto(element, picture, small = false) {
  const path = small ? thumbnailPath(picture.id) : imagePath(picture.id);
  const image = make("img", { alt: pictureName(picture), draggable: false });
  try {
    image.src = await address(path);
    await image.decode();
    element.replaceChildren(image);
  } catch {
    element.replaceChildren(make("span", { className: "quiet small" }, t("deleted")));
  }
  element.classList.remove("empty");
}

/** A file name from the prompt and the seed, as `koala generate` makes it. */
export function fileName({ settings }) {
  const words = settings.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  return `${words.slice(0, 48).replace(/-+$/, "") || "picture"}-${settings.seed}.png`;
}
