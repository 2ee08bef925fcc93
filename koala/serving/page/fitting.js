// Settings of an image, fitted to the model that this server has. What belongs to another model is
// left out, and named.

import { hasImage } from "./init_image.js";
import { hasLora } from "./loras.js";
import { isFar, nativeSize } from "./sizes.js";
import { t } from "./words.js";

const MOST_SEED = Number.MAX_SAFE_INTEGER;

/**
 * [settings for the form, lines for a person] of what was found in an image.
 *
 * Settings that koala wrote for this model stay as they are. Those of another model or program
 * keep prompts, seed and shape; steps, guidance and sampler are this model's own.
 */
export function fitted(found, about) {
  const { source, model, others = [] } = found;
  const foreign = Boolean(source) && (source !== "koala" || model !== about.model);
  const settings = { ...found, scheduler: schedulerOf(found, about) };
  const left = [...others];
  const notes = [];
  if (found.seed > MOST_SEED) {
    settings.seed = undefined;
    notes.push(t("large-seed"));
  }
  if (foreign) {
    if (model) notes.push(t("made-with", { model }));
    const { steps, guidance, scheduler } = about.sampling;
    if (found.steps && found.steps !== steps) left.push(t("left-steps", { n: found.steps }));
    if (found.guidance !== undefined && found.guidance !== guidance) {
      left.push(t("left-guidance", { n: found.guidance }));
    }
    if (found.sampler && settings.scheduler !== scheduler) left.push(found.sampler);
    Object.assign(settings, { steps, guidance, scheduler });
    if (guidance <= 1 && found.negative_prompt) {
      settings.negative_prompt = "";
      left.push(t("negative"));
    }
    settings.guidance_until = guidance > 1 ? found.guidance_until : 1;
    settings.guidance_rescale = guidance > 1 ? found.guidance_rescale : 0;
    const { width, height } = found;
    if (width && height && (isFar(about, width, height) || width % 8 || height % 8)) {
      [settings.width, settings.height] = nativeSize(about.size, width, height);
      left.push(`${width} × ${height}`);
    }
  } else if (found.sampler && !settings.scheduler) {
    left.push(found.sampler);
  }
  const lacking = (found.loras ?? []).filter(([name]) => !hasLora(name));
  settings.loras = (found.loras ?? []).filter(([name]) => hasLora(name));
  left.push(...lacking.map(([name]) => t("left-lora", { name })));
  const fromImage = source && source !== "koala" ? found.strength : found.image;
  if (!fromImage) settings.strength = undefined;
  else if (!hasImage()) notes.push(t("other-image"));
  if (left.length) notes.push(t("left-out", { list: [...new Set(left)].join(", ") }));
  return [settings, notes];
}

/** Our name of a sampler, with its steps; undefined if it is not here. */
function schedulerOf({ sampler, schedule }, about) {
  if (!sampler) return undefined;
  const own = !schedule || schedule === "trailing" || schedule === "lcm";
  const entries = Object.entries(about.schedulers);
  const id = entries.find(([, name]) => name.toLowerCase() === sampler.toLowerCase())?.[0];
  return id && (own ? id : `${id}-${schedule}`);
}
