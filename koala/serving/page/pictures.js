// Pictures of the server: fetched with the key, shown from memory.

import { make } from "./dom.js";
import { fetchBlob } from "./server.js";

const urls = new Map(); // path -> promise of an object URL
const MOST = 400; // pictures that are kept in memory

/** An address for an <img>; the picture is fetched once. */
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

/** A picture's name for people. */
export const pictureName = ({ settings }) => `${settings.prompt}, seed ${settings.seed}`;

/** Puts a picture into an element in place of what is there, once it is loaded. */
export async function pictureInto(element, picture, small = false) {
  const path = small ? thumbnailPath(picture.id) : imagePath(picture.id);
  const image = make("img", { alt: pictureName(picture), draggable: false });
  try {
    image.src = await address(path);
    await image.decode();
    element.replaceChildren(image);
  } catch {
    element.replaceChildren(make("span", { className: "quiet small" }, "gone"));
  }
  element.classList.remove("empty");
}
