// Sizes: those that the model is made for, in several shapes, and a note about others.

import { $ } from "./dom.js";
import { t } from "./words.js";

const SHAPES = [[1, 1], [5, 4], [4, 5], [3, 2], [2, 3], [16, 9], [9, 16]];

export const eighths = (pixels) => Math.max(16, 8 * Math.round(pixels / 8));

/** The native area in the shape of width x height. */
export function nativeSize(side, width, height) {
  const scale = side / Math.sqrt(width * height);
  return [eighths(width * scale), eighths(height * scale)];
}

/** Whether a size is not one that the model was made for. */
export function isFar({ size, far }, width, height) {
  const share = (width * height) / size ** 2;
  return share > far || share < 1 / far;
}

/** Fills the size chooser. */
export function fillSizes(about) {
  const [square, ...others] = SHAPES.map(([w, h]) => {
    const [width, height] = nativeSize(about.size, w, h);
    const size = `${width} × ${height}`;
    return new Option(w === h ? t("square", { size }) : `${size}, ${w}:${h}`, `${width}x${height}`);
  });
  square.value = "";
  $("size").replaceChildren(square, ...others, new Option(t("own-size"), "own"));
}

/** Says what becomes of a size that the model was not made for. */
export function noteSize(about, size) {
  const far = size && size.every((side) => side > 0) && isFar(about, ...size);
  $("size-note").hidden = !far;
  if (!far) return;
  const drawn = nativeSize(about.size, ...size).join(" × ");
  $("size-note").textContent = t(about.fit ? "size-fitted" : "size-far", {
    native: `${about.size} × ${about.size}`, drawn, size: size.join(" × "),
  });
}
