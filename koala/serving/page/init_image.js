// The image to start from: read from a file, cropped to the output size, shown with its mask.
// The pixels shown are the pixels sent; a photograph's metadata is not.

import { $, make } from "./dom.js";
import { t } from "./words.js";
import { painted, paintOver, sizeMask, forgetMask, maskPicture, openPainter } from "./mask.js";

let bitmap = null; // the original image
let origin = null; // where it comes from: an id of the gallery, or a Blob
let sizeFor = () => [64, 64]; // (width, height of an image) -> output size
let changed = () => {};

/** Whether there is an image to start from. */
export const hasImage = () => bitmap !== null;

/** Sets up the panel. `size(width, height)` returns the output size for an image. */
export function startPanel(size, onChange) {
  [sizeFor, changed] = [size, onChange];
  $("file").addEventListener("change", () => {
    if ($("file").files[0]) setImage($("file").files[0]);
    $("file").value = "";
  });
  $("ungive").addEventListener("click", () => setImage(null));
  $("paint").addEventListener("click", () => openPainter(cut(), show));
  $("given-picture").addEventListener("click", () => openPainter(cut(), show));
  $("unpaint").addEventListener("click", () => {
    forgetMask();
    show();
    $("paint").focus();
  });
}

/**
 * Sets the image to start from, or removes it (null). False if the file is not an image.
 * from: an id of the gallery, where it is one of its images.
 */
export async function setImage(file, from = file) {
  let next = null;
  try {
    if (file) next = await createImageBitmap(file);
  } catch {
    complain(t("bad-image", { name: file.name }));
    return false;
  }
  bitmap?.close();
  [bitmap, origin] = [next, next && from];
  forgetMask();
  show();
  if (bitmap) $("start").open = true;
  return true;
}

let complain = () => {};

/** Sets `f(text)`, called for files that are not images. */
export function onBadFile(f) {
  complain = f;
}

/** Updates the panel; call it also when the size has changed. */
export function show() {
  $("drop").hidden = hasImage();
  $("given").hidden = !hasImage();
  changed();
  if (!hasImage()) return;
  const [width, height] = sizeFor(bitmap.width, bitmap.height);
  sizeMask(width, height);
  const shown = $("given-picture");
  const scale = Math.max(1, Math.round(512 / Math.max(width, height)));
  [shown.width, shown.height] = [width * scale, height * scale];
  const context = shown.getContext("2d");
  context.drawImage(cut(), 0, 0, shown.width, shown.height);
  paintOver(context);
  const share = painted();
  $("unpaint").hidden = share === 0;
  $("mask-note").hidden = share === 0;
  $("mask-note").textContent = t("masked", { n: Math.max(1, Math.round(100 * share)) });
  $("paint").textContent = t(share ? "edit-mask" : "paint");
  $("blur-field").hidden = $("fill-field").hidden = share === 0;
}

/** The image on a white canvas of the output size, centred and cropped. */
function cut() {
  const [width, height] = sizeFor(bitmap.width, bitmap.height);
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  return canvas;
}

/** What the next image is made from: an id of the gallery, a Blob, or null. */
export const imageOrigin = () => origin;

/** The fields {image, mask, size} of a job; empty without an image. */
export function imageFields() {
  if (!hasImage()) return {};
  const picture = cut();
  const fields = {
    image: picture.toDataURL("image/png"), size: `${picture.width}x${picture.height}`,
  };
  const mask = maskPicture();
  if (mask) fields.mask = mask.toDataURL("image/png");
  return fields;
}
