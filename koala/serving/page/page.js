// The page: starts and connects its parts.

import { $, make, notify } from "./dom.js";
import { call, onKeyWanted } from "./server.js";
import { fill, changed, readForm, sizeToDraw, startChanged, startForm } from "./form.js";
import { setImage, onBadFile, startPanel } from "./init_image.js";
import { startPainter } from "./mask.js";
import { add, refreshWelcome, startGallery, view } from "./gallery.js";
import { draw, startJobs } from "./jobs.js";
import { readSettings } from "./png.js";

const MOST_BYTES = 1 << 28; // of a file to read settings from

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/** Asks for the key in a dialog; resolves to null if it is closed without one. */
function askForKey(wrong) {
  $("ask-why").textContent = wrong
    ? "That key is not valid." : "Ask the server's operator for one.";
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

async function submit() {
  if ($("draw").disabled) return;
  complain("");
  $("draw").disabled = true;
  try {
    const card = await draw(readForm());
    const box = card.getBoundingClientRect();
    if (box.top < 0 || box.bottom > innerHeight) {
      card.scrollIntoView({ behavior: "smooth", block: "start" });
    }
  } catch (error) {
    complain(error.message);
  } finally {
    $("draw").disabled = false;
  }
}

/** Handles a dropped file: on the panel it is the image to start from, elsewhere its settings. */
async function dropped(event) {
  event.preventDefault();
  $("dropping").hidden = true;
  const file = event.dataTransfer.files[0];
  if (!file) return;
  complain("");
  if ($("start").contains(event.target)) return void (await setImage(file));
  const settings = file.size <= MOST_BYTES && (await readSettings(await file.arrayBuffer()));
  if (settings) fill(settings, `The settings of ${file.name} are now in the form.`);
  else if (await setImage(file)) notify(`${file.name} has no settings: the next image starts from it.`);
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
  addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (document.querySelector("dialog[open]")) return;
    event.preventDefault();
    submit();
  });
}

async function start() {
  const [about, all] = await Promise.all([call("page/about.json"), call("page/presets.json")]);
  const presets = all[about.model] ?? all.other;
  $("model").textContent = about.model;
  $("prompt").placeholder = presets.examples[0];
  onBadFile(complain);
  startPainter();
  startPanel(sizeToDraw, startChanged);
  startForm(about, presets);
  startKeys();
  startDropping();
  onKeyWanted(askForKey);
  $("examples").replaceChildren(...presets.examples.map((words) => {
    const chip = make("button", { type: "button" }, words);
    chip.addEventListener("click", () => {
      $("prompt").value = words;
      changed();
      submit();
    });
    return chip;
  }));
  const wide = matchMedia("(min-width: 60rem)").matches;
  $("more").open = wide;
  new MutationObserver(refreshWelcome).observe($("jobs"), { childList: true });
  await startJobs(about.size, add, view); // first, so that no finished image is missed
  await startGallery();
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => complain(error.message));
