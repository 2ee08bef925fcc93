// The mask: which parts of an image are repainted. It is painted in cells of 8 x 8 pixels, one for
// each latent position, so what is shown is what the server does.

import { $, make, closable, press, pressed } from "./dom.js";

const CELL = 8; // pixels per side of a latent position
const COLOUR = [226, 61, 136]; // of the painted area
const VEIL = 165; // its opacity, of 255

let strokes = []; // {points: [[x, y]], width, erase}, in units of the shorter side
let [columns, rows] = [8, 8];
let current = null; // the stroke being drawn
let ground = null; // canvas of the image in the painter
let done = () => {};
let cursor = [0.5, 0.5]; // of the keyboard; relative to width and height

/** Sets the image's size in pixels; another aspect ratio clears the mask. */
export function sizeMask(width, height) {
  const next = [Math.ceil(width / CELL), Math.ceil(height / CELL)];
  if (next[0] * rows !== next[1] * columns) strokes = [];
  [columns, rows] = next;
}

export function forgetMask() {
  strokes = [];
}

/** The painted share of the cells. */
export function painted() {
  const on = cells();
  return on.reduce((sum, cell) => sum + cell, 0) / on.length;
}

/** The cells, row by row: 1 where painted. */
function cells() {
  const canvas = make("canvas", { width: columns, height: rows });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const side = Math.min(columns, rows);
  context.scale(side, side);
  context.lineCap = context.lineJoin = "round";
  for (const { points, width, erase } of current ? [...strokes, current] : strokes) {
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.lineWidth = width;
    context.beginPath();  // a dab: of a line without length nothing would be drawn
    context.arc(...points[0], width / 2, 0, 2 * Math.PI);
    context.fill();
    context.beginPath();
    context.moveTo(...points[0]);
    for (const point of points) context.lineTo(...point);
    context.stroke();
  }
  const { data } = context.getImageData(0, 0, columns, rows);
  return Array.from({ length: columns * rows }, (_, i) => Number(data[4 * i + 3] >= 100));
}

/** A canvas with one pixel per cell; `on` and `off` are [r, g, b, a]. */
function drawn(on, off) {
  const canvas = make("canvas", { width: columns, height: rows });
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  cells().forEach((cell, i) => image.data.set(cell ? on : off, 4 * i));
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Draws the mask over an image that fills the context's canvas. */
export function paintOver(context) {
  context.imageSmoothingEnabled = false;
  const { width, height } = context.canvas;
  context.drawImage(drawn([...COLOUR, VEIL], [0, 0, 0, 0]), 0, 0, width, height);
}

/** The mask at output size, white where painted; null without a mask. */
export function maskPicture() {
  if (!painted()) return null;
  const canvas = make("canvas", { width: columns * CELL, height: rows * CELL });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  const mask = drawn([255, 255, 255, 255], [0, 0, 0, 255]);
  context.drawImage(mask, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// --- the painter ---------------------------------------------------------------------------

/** Opens the painter over an image (a canvas); `onDone` is called when it closes. */
export function openPainter(picture, onDone) {
  [ground, done, current] = [picture, onDone, null];
  sizeMask(picture.width, picture.height);
  const scale = Math.max(1, Math.round(1024 / Math.max(picture.width, picture.height)));
  [$("canvas").width, $("canvas").height] = [picture.width * scale, picture.height * scale];
  press($("erase"), false);
  $("painter").showModal();
  $("canvas").focus({ preventScroll: true });
  refresh(false);
}

function refresh(withCursor) {
  const context = $("canvas").getContext("2d");
  const { width, height } = context.canvas;
  context.imageSmoothingEnabled = true;
  context.drawImage(ground, 0, 0, width, height);
  paintOver(context);
  if (withCursor) ring(context, cursor[0] * width, cursor[1] * height);
  $("undo").disabled = $("clear").disabled = strokes.length === 0;
}

/** Draws the brush's outline, visible on any background. */
function ring(context, x, y) {
  const radius = (brushWidth() * Math.min(context.canvas.width, context.canvas.height)) / 2;
  for (const [style, line] of [["#000a", 6], ["#fff", 2]]) {
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    [context.strokeStyle, context.lineWidth] = [style, line];
    context.stroke();
  }
}

const brushWidth = () => $("brush").valueAsNumber / 100;

/** Converts a point from relative coordinates to units of the shorter side. */
function inSides([x, y]) {
  const side = Math.min(columns, rows);
  return [(x * columns) / side, (y * rows) / side];
}

function place(event) {
  const box = $("canvas").getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function begin(at) {
  current = { points: [inSides(at)], width: brushWidth(), erase: pressed($("erase")) };
}

function end() {
  if (current) strokes.push(current);
  current = null;
}

function undo() {
  strokes.pop();
  refresh(false);
}

const ARROWS = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
};

function key(event) {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  else if (event.key === "[" || event.key === "]") {
    $("brush").valueAsNumber += event.key === "]" ? 3 : -3;
    refresh(true);
  } else if (event.target === $("canvas") && event.key in ARROWS) {
    const step = Math.max(brushWidth() / 2, 1 / Math.min(columns, rows));
    cursor = cursor.map((at, i) =>
      Math.min(1, Math.max(0, at + (ARROWS[event.key][i] * step))));
    refresh(true);
  } else if (event.target === $("canvas") && event.key === " ") {
    begin(cursor);
    end();
    refresh(true);
  } else return;
  event.preventDefault();
}

/** Sets up the painter, once. */
export function startPainter() {
  const canvas = $("canvas");
  closable($("painter"));
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    begin(place(event));
    refresh(false);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") cursor = place(event);
    if (current) current.points.push(inSides(place(event)));
    if (current || event.pointerType === "mouse") refresh(event.pointerType === "mouse");
  });
  canvas.addEventListener("pointerleave", () => refresh(false));
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      end();
      refresh(event.pointerType === "mouse");
    });
  }
  $("painter").addEventListener("keydown", key);
  $("undo").addEventListener("click", undo);
  $("clear").addEventListener("click", () => {
    strokes = [];
    refresh(false);
  });
  $("erase").addEventListener("click", () => press($("erase"), !pressed($("erase"))));
  $("painter").addEventListener("close", () => {
    end();
    done();
  });
}
