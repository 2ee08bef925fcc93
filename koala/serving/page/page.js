// The page: starts and connects its parts.

import { $, make, notify } from "./dom.js";
import { fitted } from "./fitting.js";
import { fill, changed, readForm, sizeToDraw, startChanged, startForm } from "./form.js";
import { add, DRAGGED, look, refreshWelcome, startGallery } from "./gallery.js";
import { drawGrid, startGrid } from "./grid.js";
import { imageOrigin, setImage, onBadFile, startPanel } from "./init_image.js";
import { draw, startJobs } from "./jobs.js";
import { startPainter } from "./mask.js";
import { readSettings } from "./metadata.js";
import { call, onKeyWanted } from "./server.js";
import { startFrom, startViewer, view } from "./viewer.js";
import { startWords, t } from "./words.js";

const MOST_BYTES = 1 << 28; // of a file to read settings from
let about = {};

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/** Asks for the key in a dialog; resolves to null if it is closed without one. */
function askForKey(wrong) {
  $("ask-why").textContent = t(wrong ? "wrong-key" : "ask-why");
  $("key").value = "";
  $("ask").returnValue = "";
  $("ask").showModal();
  return new Promise((resolve) => {
    $("ask").addEventListener(
      "close", () => resolve($("ask").returnValue === "ok" ? $("key").value.trim() : null),
      { once: true },
    );
  });
}

/** Submits what `make` submits, and brings its card into sight. */
async function submit(make = () => draw(readForm(), imageOrigin())) {
  if ($("draw").disabled) return;
  complain("");
  $("draw").disabled = $("draw-grid").disabled = true;
  try {
    const card = await make();
    const box = card.getBoundingClientRect();
    if (card.checkVisibility() && (box.top < 0 || box.bottom > innerHeight)) {
      card.scrollIntoView({ behavior: "smooth", block: "start" });
    }
  } catch (error) {
    complain(error.message);
  } finally {
    $("draw").disabled = $("draw-grid").disabled = false;
  }
}

/** Handles a dropped file: on the panel it is the image to start from, elsewhere its settings. */
async function dropped(event) {
  event.preventDefault();
  $("dropping").hidden = true;
  const dragged = event.dataTransfer.getData(DRAGGED);
  if (dragged) return void ($("form").contains(event.target) && (await startFrom(dragged)));
  const file = event.dataTransfer.files[0];
  if (!file) return;
  complain("");
  if ($("start").contains(event.target)) return void (await setImage(file));
  const settings = file.size <= MOST_BYTES && (await readSettings(await file.arrayBuffer()));
  if (settings) {
    const [fitting, notes] = fitted(settings, about);
    fill(fitting, [t("settings-of", { name: file.name }), ...notes]);
  } else if (await setImage(file)) notify(t("no-settings", { name: file.name }));
}

function startDropping() {
  let depth = 0; // of nested elements that the drag has entered
  const files = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => {
    if (!files(event)) return;
    depth++;
    $("dropping").hidden = $("start").contains(event.target);
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (depth === 0) $("dropping").hidden = true;
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    depth = 0;
    dropped(event).catch((error) => complain(error.message));
  });
}

function startKeys() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("draw-grid").addEventListener("click", () => submit(drawGrid));
  addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (document.querySelector("dialog[open]")) return;
    event.preventDefault();
    submit();
  });
}

/** The names of the server's LoRAs. */
async function loraNames() {
  const { data } = await call("v1/models");
  return data[0].loras;
}

async function start() {
  await startWords();
  onKeyWanted(askForKey);
  const [facts, all] = await Promise.all([call("page/about.json"), call("page/presets.json")]);
  about = facts;
  const presets = all[about.model.startsWith("koala-mini") ? "koala-mini" : "other"];
  $("model").textContent = about.model;
  $("prompt").placeholder = presets.examples[0];
  onBadFile(complain);
  startPainter();
  startPanel(sizeToDraw, startChanged);
  startForm(about, presets, await loraNames());
  startKeys();
  startDropping();
  startViewer(about);
  $("examples").replaceChildren(...presets.examples.map((words) => {
    const chip = make("button", { type: "button" }, words);
    chip.addEventListener("click", () => {
      $("prompt").value = words;
      changed();
      submit();
    });
    return chip;
  }));
  $("more").open = matchMedia("(min-width: 60rem)").matches;
  new MutationObserver(refreshWelcome).observe($("jobs"), { childList: true });
  // Jobs first, so that no finished image is missed.
  const tick = () => look().catch(() => {});
  await startJobs(about.size, { picture: add, view, tick });
  await startGallery(view);
  startGrid(about);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => complain(error.message));
