// A grid of two settings: one image for each pair of values, all else as in the form.

import { $, make, notify, storage } from "./dom.js";
import { readForm, randomSeed } from "./form.js";
import { add } from "./gallery.js";
import { addGroup } from "./jobs.js";
import { OVER } from "./card.js";
import { pictureInto, pictureName } from "./pictures.js";
import { call } from "./server.js";
import { t } from "./words.js";
import { view } from "./viewer.js";

const MOST = 36; // images
const FIELDS = { // setting -> field of a job, for numbers
  steps: "steps", guidance: "guidance", until: "guidance_until", rescale: "guidance_rescale",
  seed: "seed", strength: "strength", blur: "mask_blur",
};
const AXES = ["", "words", "scheduler", ...Object.keys(FIELDS)];
const EXAMPLES = {
  words: "fox, owl, cat", steps: "4, 10, 20", guidance: "2, 3.5, 6", until: "0.5, 1",
  rescale: "0, 0.7", seed: "1, 2, 3", strength: "0.3, 0.6, 0.9", blur: "0, 4, 16",
};
let about = {};

/** Builds the panel, and shows the last grid again. */
export function startGrid(server) {
  about = server;
  for (const axis of ["x", "y"]) {
    $(axis).replaceChildren(...AXES.map((name) => new Option(t(name || "none"), name)));
    $(axis).addEventListener("change", () => {
      $(`${axis}-values`).value = $(axis).value === "scheduler"
        ? Object.keys(about.schedulers).join(", ") : EXAMPLES[$(axis).value] ?? "";
    });
  }
  const last = storage.read("grid");
  if (last) show(last);
}

/** The values of an axis: [] without one. Throws an Error with a message for the user. */
function valuesOf(axis) {
  const name = $(axis).value;
  if (!name) return [""];
  const found = $(`${axis}-values`).value.split(",").map((text) => text.trim()).filter(Boolean);
  if (!found.length) throw new Error(t("grid-empty", { name: t(name) }));
  if (!(name in FIELDS)) return found;
  const wrong = found.find((text) => !Number.isFinite(Number(text)));
  if (wrong) throw new Error(t("not-number", { label: `${t(name)} (${wrong})` }));
  return found.map(Number);
}

/** Submits the grid's jobs. Throws an Error with a message for the user. */
export async function drawGrid() {
  const [x, y] = [$("x").value, $("y").value];
  const [columns, rows] = [valuesOf("x"), valuesOf("y")];
  if (!x && !y) throw new Error(t("grid-none"));
  if (x === y) throw new Error(t("grid-same"));
  if (columns.length * rows.length > MOST) throw new Error(t("grid-many", { most: MOST }));
  const fields = { ...readForm(), n: 1 };
  fields.seed ??= Number(randomSeed());
  const ids = [];
  for (const row of rows) {
    for (const column of columns) {
      const each = { ...fields };
      set(each, x, column, columns);
      set(each, y, row, rows);
      ids.push((await call("v1/jobs", { method: "POST", json: each })).id);
    }
  }
  const grid = { x, y, columns, rows, ids, prompt: fields.prompt };
  storage.write("grid", grid);
  return show(grid);
}

function set(fields, name, value, all) {
  if (name === "words") {
    if (!fields.prompt.includes(all[0])) throw new Error(t("grid-words", { word: all[0] }));
    fields.prompt = fields.prompt.replaceAll(all[0], value);
  } else if (name === "scheduler") fields.scheduler = value;
  else if (name) fields[FIELDS[name]] = value;
}

function show({ x, y, columns, rows, ids, prompt }) {
  const jobs = new Map(ids.map((id) => [id, { open: true, cell: make("td", {}, tile()) }]));
  const named = (name, value) => (name ? `${t(name)} ${value}` : "");
  const head = make("tr", {}, make("td"), ...columns.map(
    (value) => make("th", { scope: "col" }, named(x, value))));
  const body = rows.map((value, r) => make("tr", {},
    make("th", { scope: "row" }, named(y, value)),
    ...columns.map((_, c) => jobs.get(ids[r * columns.length + c]).cell)));
  const close = make("button", { type: "button", className: "small" }, t("dismiss"));
  const card = make("article", { className: "card job" },
    make("div", { className: "head" },
      make("div", { className: "text" }, make("p", { className: "words", title: prompt }, prompt),
        make("p", { className: "said quiet" }, t("grid"))), close),
    make("div", { className: "sheet", tabIndex: 0, role: "region", "aria-label": t("grid") },
      make("table", {}, ...[head, ...body])));
  const group = {
    has: (id) => card.isConnected && jobs.has(id),
    open: () => (card.isConnected ? [...jobs.values()].filter((job) => job.open).length : 0),
    update: (job) => update(jobs.get(job.id), job),
    cancel: () => Promise.all([...jobs].filter(([, job]) => job.open).reverse().map(
      async ([id]) => group.update(await call(`v1/jobs/${id}/cancel`, { method: "POST" })))),
  };
  close.addEventListener("click", () => {
    group.cancel().catch((error) => notify(error.message));
    card.remove();
    storage.write("grid", null);
  });
  $("grids").replaceChildren(card); // the last one alone
  addGroup(group);
  for (const id of ids) {
    call(`v1/jobs/${id}`).then(group.update, () => update(jobs.get(id), { status: "failed" }));
  }
  return card;
}

const tile = () => make("div", { className: "tile empty" });

function update(entry, job) {
  if (!entry.open || !OVER.includes(job.status)) return;
  entry.open = false;
  const [picture] = job.pictures ?? [];
  if (!picture) {
    const text = job.error?.message ?? t(job.status === "cancelled" ? "cancelled" : "deleted");
    entry.cell.replaceChildren(make("p", { className: "quiet small" }, text));
    return;
  }
  const button = make("button", { type: "button", className: "tile" });
  button.setAttribute("aria-label", t("view", { picture: pictureName(picture) }));
  button.addEventListener("click", () => view(picture.id));
  entry.cell.replaceChildren(button);
  pictureInto(button, picture);
  add(picture);
}
