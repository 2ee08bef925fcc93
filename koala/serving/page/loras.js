// The LoRAs of the next image: chosen from the server's folder, each with a scale.

import { $, make, storage } from "./dom.js";
import { t } from "./words.js";

let known = []; // names in the server's folder
let chosen = []; // [[name, scale]]

/** The chosen LoRAs: [[name, scale]]. */
export const loras = () => chosen;

/** Whether the server has a LoRA. */
export const hasLora = (name) => known.includes(name);

/** Shows the picker for the server's LoRAs and restores the last choice. */
export function startLoras(names) {
  known = names;
  $("loras").hidden = known.length === 0;
  $("lora").addEventListener("change", () => {
    setLoras([...chosen, [$("lora").value, 1]]);
    $("lora-list").querySelector("li:last-child input").focus();
  });
  setLoras((storage.read("loras") ?? []).filter(([name]) => hasLora(name)));
}

export function setLoras(next) {
  chosen = next;
  storage.write("loras", chosen);
  const left = known.filter((name) => !chosen.some(([other]) => other === name));
  $("lora").replaceChildren(
    new Option(t(left.length ? "choose" : "no-more"), ""),
    ...left.map((name) => new Option(name, name)),
  );
  $("lora").disabled = left.length === 0;
  $("lora-list").replaceChildren(...chosen.map(row));
  $("loras").open ||= chosen.length > 0;
}

function row([name, scale], i) {
  const field = make("input", {
    type: "number", value: String(scale), min: "-100", max: "100", step: "0.05",
    "aria-label": t("lora-scale", { name }),
  });
  field.addEventListener("input", () => {
    if (Number.isFinite(field.valueAsNumber)) chosen[i][1] = field.valueAsNumber;
    storage.write("loras", chosen);
  });
  const off = make("button", {
    type: "button", className: "small", "aria-label": t("lora-remove", { name }),
  }, t("remove"));
  off.addEventListener("click", () => setLoras(chosen.filter(([other]) => other !== name)));
  return make("li", {}, make("span", {}, name), field, off);
}
