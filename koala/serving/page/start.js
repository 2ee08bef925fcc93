// The picture to start from: given as a file, cut to the size that is drawn, shown with its mask.
// What is shown is what is sent, pixel for pixel; a photograph's place and camera stay here.

import { $, make } from "./dom.js";
import { painted, paintOver, sizeMask, forgetMask, maskPicture, openPainter } from "./mask.js";

let bitmap = null; // the picture as it came
let sizeFor = () => [64, 64]; // (width, height of a picture) -> size to draw at
let changed = () => {};

/** Whether there is a picture to start from. */
export const given = () => bitmap !== null;

/** Wires the panel. `size(width, height)` says what is drawn from a picture of that size. */
export function startPanel(size, onChange) {
  [sizeFor, changed] = [size, onChange];
  $("file").addEventListener("change", () => {
    if ($("file").files[0]) give($("file").files[0]);
    $("file").value = "";
  });
  $("ungive").addEventListener("click", () => give(null));
  $("paint").addEventListener("click", () => openPainter(cut(), show));
  $("given-picture").addEventListener("click", () => openPainter(cut(), show));
  $("unpaint").addEventListener("click", () => {
    forgetMask();
    show();
    $("paint").focus();
  });
}

/** Takes a file as the picture to start from, null for none. False if it is no picture. */
export async function give(file) {
  let next = null;
  try {
    if (file) next = await createImageBitmap(file);
  } catch {
    const name = file.name || "This file";
    complain(`${name} cannot be read as a picture: choose a PNG, JPEG or WebP.`);
    return false;
  }
  bitmap?.close();
  bitmap = next;
  forgetMask();
  show();
  if (bitmap) $("start").open = true;
  return true;
}

let complain = () => {};

/** `f(text)` is told of files that are no pictures. */
export function onBadFile(f) {
  complain = f;
}

/** Shows the panel as things are; to be called when the size has changed, too. */
export function show() {
  $("drop").hidden = given();
  $("given").hidden = !given();
  changed();
  if (!given()) return;
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
  $("mask-note").textContent = `${Math.max(1, Math.round(100 * share))} % is drawn anew.`;
  $("paint").textContent = share ? "Edit mask" : "Paint mask";
}

/** The picture as a canvas of the size that is drawn: its middle, on white. */
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

/** What goes into a job: {image, mask, size}; nothing without a picture. */
export function startOrder() {
  if (!given()) return {};
  const picture = cut();
  const order = {
    image: picture.toDataURL("image/png"), size: `${picture.width}x${picture.height}`,
  };
  const mask = maskPicture();
  if (mask) order.mask = mask.toDataURL("image/png");
  return order;
}
