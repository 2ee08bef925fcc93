// The viewer of one image: its settings, what it was made from, and what can be made of it.

import { $, closable, make, notify, press, pressed, storage } from "./dom.js";
import { fitted } from "./fitting.js";
import { changed, fill, randomSeed } from "./form.js";
import { drop, isFavourite, neighbours, removeImage, setFavourite } from "./gallery.js";
import { setImage } from "./init_image.js";
import { draw } from "./jobs.js";
import { originOf } from "./origins.js";
import { address, fileName, imagePath, pictureName } from "./pictures.js";
import { fetchBlob } from "./server.js";
import { eighths } from "./sizes.js";
import { t } from "./words.js";

const VARY = 0.6; // strength of a variation
const ENLARGE = { factor: 2, strength: 0.4 };
let about = {};
let viewed = null; // the image in the viewer

/** Sets up the viewer for the server's model. */
export function startViewer(server) {
  about = server;
  closable($("viewer"));
  $("newer").addEventListener("click", () => move("newer"));
  $("next").addEventListener("click", () => move("older"));
  $("viewer").addEventListener("keydown", (event) => {
    if (event.target === $("split")) return;
    if (event.key === "ArrowLeft") move("newer");
    if (event.key === "ArrowRight") move("older");
  });
  const actions = {
    use, again, vary, enlarge, begin, copy, delete: remove, compare: () => compare(),
    favourite: () => setStar(!isFavourite(viewed.id)),
    crisp: () => {
      press($("crisp"), !pressed($("crisp")));
      storage.write("crisp", pressed($("crisp")));
      fit();
    },
  };
  for (const [id, act] of Object.entries(actions)) {
    $(id).addEventListener("click", async () => {
      try {
        await act();
      } catch (error) {
        notify(error.message);
      }
    });
  }
  press($("crisp"), storage.read("crisp") === true);
  $("split").addEventListener("input", cut);
  $("viewed").addEventListener("load", fit);
  addEventListener("resize", fit);
}

/** Opens an image of the gallery. */
export async function view(id) {
  const found = neighbours(id);
  if (!found) return;
  viewed = found.picture;
  const { settings } = viewed;
  $("newer").disabled = !found.newer;
  $("next").disabled = !found.older;
  $("viewed-prompt").textContent = settings.prompt;
  $("viewed-settings").replaceChildren(...described(settings).flatMap(([name, value]) => [
    make("dt", {}, t(name)), make("dd", {}, String(value)),
  ]));
  $("viewed").alt = pictureName(viewed);
  $("delete").textContent = t("delete");
  $("enlarge").disabled = !largerSize();
  $("compare").hidden = !originOf(id);
  press($("compare"), false);
  $("before").hidden = $("split").hidden = true;
  setStar(isFavourite(id));
  if (!$("viewer").open) $("viewer").showModal();
  fit();
  const url = await address(imagePath(id)).catch((error) => notify(error.message));
  if (!url || viewed?.id !== id) return;
  $("viewed").src = url;
  $("download").href = url;
  $("download").download = fileName(viewed);
}

function described(settings) {
  const rows = [];
  if (settings.negative_prompt) rows.push(["negative", settings.negative_prompt]);
  rows.push(
    ["size", settings.enlarged || `${settings.width} × ${settings.height}`],
    ["steps", settings.steps], ["guidance", settings.guidance], ["seed", settings.seed],
    ["scheduler", settings.sampler],
  );
  if (settings.guidance_until < 1) rows.push(["until", settings.guidance_until]);
  if (settings.guidance_rescale) rows.push(["rescale", settings.guidance_rescale]);
  if (settings.image) rows.push(["strength", settings.strength]);
  if (settings.mask) {
    rows.push(["blur", settings.mask_blur ?? 0]);
    rows.push(["fill", t(`fill-${settings.mask_fill ?? "original"}`)]);
  }
  for (const [name, scale] of settings.loras ?? []) rows.push(["lora", `${name} ${scale}`]);
  rows.push(["model", settings.model]);
  return rows;
}

/** Width and height of an image as it is shown. */
function shownSize({ enlarged, width, height }) {
  return enlarged ? enlarged.split("x").map(Number) : [width, height];
}

/**
 * Sizes the image: small ones are enlarged by an integer, so that all pixels look alike; large
 * ones are scaled to fit. The frame has its size before the image has loaded.
 */
function fit() {
  if (!viewed || !$("viewer").open) return;
  const [width, height] = shownSize(viewed.settings);
  const box = document.querySelector(".light").getBoundingClientRect();
  const room = Math.min((box.width - 32) / width, (box.height - 48) / height);
  const scale = room > 1
    ? Math.min(Math.floor(room), Math.ceil(768 / Math.max(width, height))) : room;
  for (const image of [$("viewed"), $("before")]) {
    image.style.width = `${width * scale}px`;
    image.style.height = `${height * scale}px`;
    image.classList.toggle("crisp", pressed($("crisp")) && scale > 1);
  }
  $("crisp").hidden = scale <= 1;
}

function move(way) {
  const other = neighbours(viewed.id)?.[way];
  if (other) view(other.id);
}

// --- before and after -----------------------------------------------------------------------

async function compare() {
  const on = !pressed($("compare"));
  if (on) {
    const origin = originOf(viewed.id);
    $("before").src = origin instanceof Blob
      ? URL.createObjectURL(origin) : await address(imagePath(origin));
    $("before").alt = t("before");
  }
  press($("compare"), on);
  $("before").hidden = $("split").hidden = !on;
  cut();
}

function cut() {
  $("before").style.clipPath = `inset(0 ${100 - $("split").valueAsNumber}% 0 0)`;
}

// --- what can be made of it -----------------------------------------------------------------

function use() {
  $("viewer").close();
  const [settings, notes] = fitted({ ...viewed.settings, source: "koala" }, about);
  fill(settings, [t("settings-used"), ...notes]);
  toForm($("prompt"));
}

/** The fields of a job like the image's, with another seed. */
function likeIt() {
  const { settings } = viewed;
  const [next] = fitted({ ...settings, source: "koala" }, about);
  const fields = {
    prompt: settings.prompt, seed: Number(randomSeed()), steps: next.steps,
    guidance: next.guidance, guidance_until: next.guidance_until ?? 1,
    guidance_rescale: next.guidance_rescale ?? 0, size: `${next.width}x${next.height}`,
  };
  if (next.scheduler) fields.scheduler = next.scheduler;
  if (next.negative_prompt) fields.negative_prompt = next.negative_prompt;
  if (next.loras.length) fields.lora = next.loras.map(([name, scale]) => ({ name, scale }));
  return fields;
}

async function submit(fields, origin = null) {
  await draw(fields, origin);
  notify(t("submitted"));
}

async function again() {
  const { settings } = viewed;
  const origin = originOf(viewed.id);
  if (!settings.image) return submit(likeIt());
  if (!origin || settings.mask) throw new Error(t("lacks-image"));
  const blob = origin instanceof Blob ? origin : await fetchBlob(imagePath(origin));
  const image = await encoded(blob, settings.width, settings.height);
  return submit({ ...likeIt(), image, strength: settings.strength }, origin);
}

async function vary() {
  const { width, height } = viewed.settings;
  const image = await encoded(await fetchBlob(imagePath(viewed.id)), width, height);
  const fields = likeIt();
  return submit({ ...fields, image, strength: enough(VARY, fields) }, viewed.id);
}

/** A strength that leaves at least one of the steps to do. */
const enough = (strength, { steps }) => Math.max(strength, Math.ceil(100 / steps) / 100);

/** The size that the image is enlarged to; null if the server would refuse it. */
function largerSize() {
  const [width, height] = shownSize(viewed.settings).map((side) => eighths(side * ENLARGE.factor));
  return width * height <= about.pixels ? [width, height] : null;
}

async function enlarge() {
  const [width, height] = largerSize();
  const image = await encoded(await fetchBlob(imagePath(viewed.id)), width, height);
  const fields = { ...likeIt(), seed: Math.min(viewed.settings.seed, Number.MAX_SAFE_INTEGER) };
  return submit(
    {
      ...fields, image, size: `${width}x${height}`, fit: false,
      strength: enough(ENLARGE.strength, fields),
    },
    viewed.id,
  );
}

/** An image as a data: URL, resized. */
async function encoded(blob, width, height) {
  const bitmap = await createImageBitmap(blob);
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return canvas.toDataURL("image/png");
}

/** Makes an image of the gallery the one that the next starts from. */
export async function startFrom(id) {
  const blob = await fetchBlob(imagePath(id));
  if (await setImage(new File([blob], "picture.png", { type: "image/png" }), id)) {
    changed();
    notify(t("starts-from-it"));
  }
}

async function begin() {
  await startFrom(viewed.id);
  $("viewer").close();
  toForm($("start"));
}

async function copy() {
  const text = viewed.settings.prompt;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed, or no secure context
    const field = make("textarea", { value: text });
    $("viewer").append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  notify(t("copied"));
}

function setStar(on) {
  if (isFavourite(viewed.id) !== on) setFavourite(viewed.id, on);
  press($("favourite"), on);
}

async function remove() {
  if ($("delete").textContent === t("delete")) {
    $("delete").textContent = t("delete-sure");
    return;
  }
  const gone = viewed;
  const { newer, older } = neighbours(gone.id);
  await removeImage(gone.id);
  drop(gone.id);
  const next = older ?? newer;
  if (next) await view(next.id);
  else $("viewer").close();
  notify(t("was-deleted"));
}

/** Scrolls to the form if it is out of sight, as on a phone. */
function toForm(part) {
  const { top } = $("form").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("form").scrollIntoView({ behavior: "smooth" });
  part.scrollIntoView({ behavior: "smooth", block: "nearest" });
}
