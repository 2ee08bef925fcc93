// The form: the prompt and settings. It survives reloads, can be filled from an image's settings,
// and is read into a job. The server checks the values; its error messages are shown as they are.

import { $, storage, make, press, notify } from "./dom.js";
import { hasImage, show as showStart, imageFields } from "./init_image.js";

const DEFAULTS = { // without what the model is made for
  negative: "", until: "1", seed: "", number: "1", size: "", width: "", height: "",
  strength: "0.6",
};
const NAMES = ["prompt", "steps", "guidance", "scheduler", ...Object.keys(DEFAULTS)];
const NUMBERS = [1, 2, 3, 4, 6, 8, 10];
const MOST_SEED = Number.MAX_SAFE_INTEGER; // larger integers are not exact in JavaScript
let about = { model: "", size: 64, schedulers: {}, sampling: {} };
let styles = [];
let loras = []; // [[name, scale]]

/** Builds the form for the server's model, and restores the last values. */
export function startForm(server, presets) {
  about = server;
  styles = presets.styles;
  fillSelects();
  $("styles").replaceChildren(...styles.map(styleChip));
  for (const range of document.querySelectorAll("input[data-of]")) pairUp(range);
  setValues({ ...defaults(), ...storage.read("form") });
  setLoras(storage.read("loras") ?? []);
  $("form").addEventListener("input", (event) => {
    changed();
    if (["size", "width", "height"].includes(event.target.id)) showStart();
  });
  $("dice").addEventListener("click", () => {
    $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    changed();
  });
  $("usual").addEventListener("click", () => {
    setValues(defaults());
    setLoras([]);
    notify("Settings reset.");
  });
}

function defaults() {
  const { steps, guidance, scheduler } = about.sampling;
  return { ...DEFAULTS, steps: String(steps), guidance: String(guidance), scheduler };
}

function fillSelects() {
  $("number").replaceChildren(...NUMBERS.map((n) => new Option(String(n), String(n))));
  $("scheduler").replaceChildren(
    ...Object.entries(about.schedulers).map(([id, name]) => new Option(name, id)),
  );
  const side = about.size;
  const [half, more] = [eighths(side * 0.75), eighths(side * 1.25)];
  const sizes = [
    [side, side], [more, half], [half, more], [eighths(side * 1.5), half],
    [half, eighths(side * 1.5)],
  ];
  $("size").replaceChildren(
    new Option(`Default, ${side} px`, ""),
    ...sizes.slice(1).map(([w, h]) => new Option(`${w} × ${h}`, `${w}x${h}`)),
    new Option("Custom…", "own"),
  );
}

const eighths = (pixels) => Math.max(16, 8 * Math.round(pixels / 8));

/** Links a range input and its number field. */
function pairUp(range) {
  const field = $(range.dataset.of);
  range.addEventListener("input", () => (field.value = range.value));
  field.addEventListener("input", () => (range.value = field.value));
}

/** Call it after any change: stores the values and updates what depends on them. */
export function changed() {
  storage.write("form", values());
  storage.write("loras", loras);
  refresh();
}

function values() {
  return Object.fromEntries(NAMES.map((name) => [name, $(name).value]));
}

function setValues(next) {
  if (next.size && ![...$("size").options].some((option) => option.value === next.size)) {
    const [width, height] = next.size.split("x");
    next = { ...next, size: "own", width, height };
  }
  for (const [name, value] of Object.entries(next)) {
    if (NAMES.includes(name)) $(name).value = value;
  }
  for (const select of [$("number"), $("size"), $("scheduler")]) {
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  }
  changed();
  showStart();
}

function refresh() {
  for (const range of document.querySelectorAll("input[data-of]")) {
    range.value = $(range.dataset.of).value;
  }
  for (const chip of $("styles").children) press(chip, hasStyle(chip.dataset.style));
  $("own-size").hidden = $("size").value !== "own";
}

/** Call it when the image to start from was set or removed. */
export function startChanged() {
  const side = about.size;
  $("size").options[0].text = hasImage() ? "Like the image" : `Default, ${side} px`;
}

// --- styles ---------------------------------------------------------------------------------

function styleChip(style) {
  const chip = make("button", { type: "button", "data-style": style, "aria-pressed": "false" });
  chip.textContent = style.replace(/ style$/, "");
  chip.addEventListener("click", () => {
    const had = hasStyle(style);
    const rest = parts().filter((part) => !styles.includes(part)).join(", ");
    $("prompt").value = had ? rest : rest ? `${rest}, ${style}` : style;
    changed();
  });
  return chip;
}

const parts = () =>
  $("prompt").value.split(",").map((part) => part.trim()).filter(Boolean);

const hasStyle = (style) => parts().includes(style);

// --- reading and filling --------------------------------------------------------------------

/** The output size for an input image: the chosen one, or the image's shape at native area. */
export function sizeToDraw(width, height) {
  const chosen = chosenSize();
  if (chosen && chosen.every((side) => side >= 16 && side <= 4096)) return chosen.map(eighths);
  const scale = about.size / Math.sqrt(width * height);
  return [eighths(width * scale), eighths(height * scale)];
}

function chosenSize() {
  const text = $("size").value;
  if (text === "own") return [$("width").valueAsNumber, $("height").valueAsNumber];
  return text ? text.split("x").map(Number) : null;
}

/** The fields of `POST /v1/jobs`. Throws an Error with a message for the user. */
export function readForm() {
  const prompt = $("prompt").value.trim();
  if (!prompt) {
    $("prompt").focus();
    throw new Error("Write a prompt first.");
  }
  const fields = {
    prompt, n: Number($("number").value), scheduler: $("scheduler").value,
    steps: read("steps"), guidance: read("guidance"), guidance_until: read("until"),
  };
  if ($("negative").value.trim()) fields.negative_prompt = $("negative").value.trim();
  if ($("seed").value.trim()) fields.seed = seed();
  const size = chosenSize();
  if (size?.some((side) => !(side > 0) || side % 8)) {
    throw new Error("Width and height must be multiples of 8 pixels.");
  }
  if (size) fields.size = size.join("x");
  if (loras.length) fields.lora = loras.map(([name, scale]) => ({ name, scale }));
  if (hasImage()) Object.assign(fields, { strength: read("strength") }, imageFields());
  return fields;
}

function read(name) {
  const value = $(name).valueAsNumber;
  if (Number.isFinite(value)) return value;
  const label = document.querySelector(`label[for="${name}"]`).textContent;
  $("more").open ||= $("more").contains($(name));
  $(name).focus();
  throw new Error(`${label} must be a number.`);
}

function seed() {
  const text = $("seed").value.trim();
  if (/^\d+$/.test(text) && Number(text) <= MOST_SEED) return Number(text);
  throw new Error(`The seed must be a whole number from 0 to ${MOST_SEED}.`);
}

/** Fills the form with an image's settings; the note begins with `from`. */
export function fill(settings, from) {
  const notes = [];
  const next = { prompt: settings.prompt, negative: settings.negative_prompt ?? "" };
  next.until = String(settings.guidance_until ?? 1);
  for (const name of ["steps", "guidance", "seed"]) {
    if (settings[name] !== undefined) next[name] = String(settings[name]);
  }
  if (settings.seed > MOST_SEED) {
    next.seed = "";
    notes.push("Its seed is too large for this page.");
  }
  if (settings.width && settings.height) {
    const own = settings.width === about.size && settings.height === about.size;
    next.size = own ? "" : `${settings.width}x${settings.height}`;
  }
  const named = Object.entries(about.schedulers).find(([, name]) => name === settings.sampler);
  if (named) next.scheduler = named[0];
  else if (settings.sampler) notes.push(`This server has no sampler ${settings.sampler}.`);
  const fromPicture = settings.source === "A1111" ? settings.strength : settings.image;
  if (fromPicture) {
    next.strength = String(settings.strength);
    if (!hasImage()) notes.push("It was made from another image: add that image too.");
  }
  next.number = "1";
  setValues(next);
  setLoras(settings.loras ?? []);
  if (settings.model && settings.source && settings.model !== about.model) {
    notes.push(`It was made with ${settings.model}.`);
  }
  notify([from, ...notes].join(" "));
}

function setLoras(next) {
  loras = next;
  $("loras").hidden = loras.length === 0;
  $("loras").querySelector(".chips").replaceChildren(
    ...loras.map(([name, scale]) => {
      const chip = make("button", { type: "button", title: "Remove" }, `${name} ${scale} ×`);
      chip.setAttribute("aria-label", `Remove the LoRA ${name}`);
      chip.addEventListener("click", () => setLoras(loras.filter(([other]) => other !== name)));
      return chip;
    }),
  );
  storage.write("loras", loras);
}
