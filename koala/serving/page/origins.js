// What images were made from, as far as this browser knows: an id of the gallery, or a file that
// was chosen since the page was opened.

import { storage } from "./dom.js";

const MOST = 2000; // ids that are remembered
const parents = new Map(storage.read("origins") ?? []); // image id -> image id
const files = new Map(); // image id -> Blob

/** Remembers what an image was made from: an id, a Blob, or null. */
export function remember(id, origin) {
  if (origin instanceof Blob) files.set(id, origin);
  else if (origin) {
    parents.set(id, origin);
    while (parents.size > MOST) parents.delete(parents.keys().next().value);
    storage.write("origins", [...parents]);
  }
}

/** What an image was made from, as `remember` was told; null if it is not known. */
export const originOf = (id) => files.get(id) ?? parents.get(id) ?? null;
