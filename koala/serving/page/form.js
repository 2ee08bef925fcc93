// The form: the prompt and settings. It survives reloads, can be filled from an image's settings,
// and is read into a job. The server checks the values; its error messages are shown as they are.

import { $, storage, make, press, notify, tell } from "./dom.js";
import { hasImage, show as showStart, imageFields } from "./init_image.js";
import { loras, setLoras, startLoras } from "./loras.js";
import { eighths, fillSizes, nativeSize, noteSize } from "./sizes.js";
import { weighs } from "./weights.js";
import { many, t } from "./words.js";

const DEFAULTS = { // without what the model is made for
  negative: "", until: "1", rescale: "0", seed: "", number: "1", size: "",
  strength: "0.6", blur: "4", fill: "original",
};
const NAMES = ["prompt", "steps", "guidance", "scheduler", ...Object.keys(DEFAULTS)];
const NUMBERS = [1, 2, 3, 4, 6, 8, 10];
const MOST_SEED = Number.MAX_SAFE_INTEGER; // larger integers are not exact in JavaScript
let about = { model: "", size: 64, far: 1.5, fit: false, schedulers: {}, sampling: {} };
let styles = [];

/** Builds the form for the server's model, and restores the last values. */
export function startForm(server, presets, loraNames) {
  about = server;
  styles = presets.styles;
  $("number").replaceChildren(...NUMBERS.map((n) => new Option(String(n), String(n))));
  $("scheduler").replaceChildren(
    ...Object.entries(about.schedulers).map(([id, name]) => new Option(name, id)),
  );
  fillSizes(about);
  $("styles").replaceChildren(...styles.map(styleChip));
  for (const range of document.querySelectorAll("input[data-of]")) pairUp(range);
  startLoras(loraNames);
  const last = storage.read("form");
  setValues({ ...defaults(), ...(last?.model === about.model ? last : { prompt: last?.prompt }) });
  for (const kind of ["input", "change"]) { // drivers of browsers send one of them for a select
    $("form").addEventListener(kind, (event) => {
      changed();
      if (["size", "width", "height"].includes(event.target.id)) showStart();
    });
  }
  $("dice").addEventListener("click", () => {
    $("seed").value = randomSeed();
    changed();
  });
  $("usual").addEventListener("click", () => {
    setValues(defaults());
    setLoras([]);
    notify(t("was-reset"));
  });
  $("told").querySelector("button").addEventListener("click", () => tell(""));
  weighs($("prompt"));
  weighs($("negative"));
}

export const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

function defaults() {
  const { steps, guidance, scheduler } = about.sampling;
  const [width, height] = [about.size, about.size].map(String);
  return { ...DEFAULTS, steps: String(steps), guidance: String(guidance), scheduler, width, height };
}

/** Links a range input and its number field. */
function pairUp(range) {
  const field = $(range.dataset.of);
  range.addEventListener("input", () => (field.value = range.value));
  field.addEventListener("input", () => (range.value = field.value));
}

/** Call it after any change: stores the values and updates what depends on them. */
export function changed() {
  const values = Object.fromEntries(NAMES.map((name) => [name, $(name).value]));
  storage.write("form", { ...values, model: about.model });
  refresh();
}

function setValues(next) {
  if (next.size && ![...$("size").options].some((option) => option.value === next.size)) {
    const [width, height] = next.size.split("x");
    next = { ...next, size: "own", width, height };
  }
  if (next.scheduler && !(next.scheduler in about.schedulers)) {
    about.schedulers[next.scheduler] = next.scheduler; // steps that are not in the list
    $("scheduler").append(new Option(next.scheduler, next.scheduler));
  }
  for (const [name, value] of Object.entries(next)) {
    if (NAMES.includes(name)) $(name).value = value ?? "";
  }
  for (const select of [$("number"), $("size"), $("scheduler"), $("fill")]) {
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
  $("fill").disabled = $("strength").valueAsNumber === 1;
  noteSize(about, chosenSize());
  noteSampling($("steps").valueAsNumber, $("guidance").valueAsNumber);
}

/** Says which steps and guidance the model is made for, where others are set. */
function noteSampling(steps, guidance) {
  const made = about.sampling;
  const beyond = (made.guidance <= 1 && guidance > 1) || (made.few && steps > made.steps);
  $("sampling-note").hidden = !beyond;
  if (!beyond) return;
  $("sampling-note").textContent = made.guidance > 1
    ? many("made-guided", made.steps, { guidance: made.guidance })
    : many("made-unguided", made.steps);
}

/** Call it when the image to start from was set or removed. */
export function startChanged() {
  const side = `${about.size} × ${about.size}`;
  $("size").options[0].text = hasImage()
    ? t("like-image") : t("square", { size: side });
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
  return nativeSize(about.size, width, height);
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
    throw new Error(t("no-prompt"));
  }
  const fields = {
    prompt, n: Number($("number").value), scheduler: $("scheduler").value,
    steps: read("steps"), guidance: read("guidance"), guidance_until: read("until"),
    guidance_rescale: read("rescale"),
  };
  if ($("negative").value.trim()) fields.negative_prompt = $("negative").value.trim();
  if ($("seed").value.trim()) fields.seed = seed();
  const size = chosenSize();
  if (size?.some((side) => !(side > 0) || side % 8)) throw new Error(t("bad-size"));
  if (size) fields.size = size.join("x");
  if (loras().length) fields.lora = loras().map(([name, scale]) => ({ name, scale }));
  if (hasImage()) Object.assign(fields, { strength: read("strength") }, imageFields());
  if (fields.mask) {
    fields.mask_blur = read("blur");
    if (!$("fill").disabled) fields.mask_fill = $("fill").value;
  }
  return fields;
}

function read(name) {
  const value = $(name).valueAsNumber;
  if (Number.isFinite(value)) return value;
  const label = document.querySelector(`label[for="${name}"]`).textContent;
  $("more").open ||= $("more").contains($(name));
  $(name).focus();
  throw new Error(t("not-number", { label }));
}

function seed() {
  const text = $("seed").value.trim();
  if (/^\d+$/.test(text) && Number(text) <= MOST_SEED) return Number(text);
  throw new Error(t("bad-seed", { most: MOST_SEED }));
}

/** Fills the form with settings that fit this model (`fitting.js`); `notes` are lines to show. */
export function fill(settings, notes) {
  const next = { ...defaults(), prompt: settings.prompt, negative: settings.negative_prompt ?? "" };
  next.until = String(settings.guidance_until ?? 1);
  next.rescale = String(settings.guidance_rescale ?? 0);
  for (const name of ["steps", "guidance", "seed", "scheduler", "strength"]) {
    if (settings[name] !== undefined) next[name] = String(settings[name]);
  }
  if (settings.mask) {
    next.blur = String(settings.mask_blur ?? 4);
    next.fill = settings.mask_fill ?? "original";
  }
  if (settings.width && settings.height) {
    const own = settings.width === about.size && settings.height === about.size;
    next.size = own ? "" : `${settings.width}x${settings.height}`;
  }
  setValues(next);
  setLoras(settings.loras ?? []);
  tell(notes.length > 1 ? notes.join(" ") : "");
  notify(notes[0]);
}
