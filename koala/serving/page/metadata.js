// The generation settings in an image file: koala's own JSON, AUTOMATIC1111's text (also in the
// EXIF of JPEG and WebP), ComfyUI's graph, InvokeAI's JSON. Files are untrusted.

import { fromComfy } from "./comfy.js";
import { userComment } from "./exif.js";
import { readTexts } from "./png.js";

/**
 * The settings in a file's bytes: {prompt, negative_prompt, steps, guidance, guidance_until,
 * guidance_rescale, seed, width, height, sampler, strength, mask_blur, loras: [[name, scale]],
 * image, mask, model, source, others: names of what is not read}; only what is known is there.
 * null for a file that holds none.
 */
export async function readSettings(buffer) {
  const texts = await readTexts(buffer);
  return fromKoala(texts.get("koala")) ?? fromInvoke(texts.get("invokeai_metadata"))
    ?? fromA1111(texts.get("parameters")) ?? settingsOf(fromComfy(texts.get("prompt")), "ComfyUI")
    ?? fromA1111(userComment(buffer));
}

/** The JSON object in a text; null if there is none. */
function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

function settingsOf(values, source) {
  return typeof values?.prompt === "string" ? { ...sound(values), source } : null;
}

const A1111_READ = [ // or without a meaning for another model
  "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash",
  "Denoising strength", "Guidance until", "Guidance rescale", "Version", "Lora hashes", "TI hashes",
  "RNG", "VAE hash",
];

/** The settings in AUTOMATIC1111's text: prompt, negative prompt, then a list of "Key: value". */
export function fromA1111(text) {
  if (typeof text !== "string") return null;
  const lines = text.trim().split("\n");
  if (!/^Steps: *\d/.test(lines.at(-1))) return null;
  const known = pairs(lines.pop());
  const from = lines.findIndex((line) => line.startsWith("Negative prompt: "));
  const positive = (from < 0 ? lines : lines.slice(0, from)).join("\n");
  const negative = from < 0 ? "" : lines.slice(from).join("\n").slice("Negative prompt: ".length);
  const loras = [];
  const prompt = positive.replace(/\s*<lora:([^:<>]+):([\d.+-]+)>/g, (_, name, scale) => {
    loras.push([name, Number(scale)]);
    return "";
  });
  const [width, height] = (known.get("Size") ?? "").split("x");
  return {
    ...sound({
      prompt, negative_prompt: negative, loras, sampler: known.get("Sampler"),
      steps: number(known.get("Steps")), guidance: number(known.get("CFG scale")),
      seed: number(known.get("Seed")), width: number(width), height: number(height),
      strength: number(known.get("Denoising strength")),
      guidance_until: number(known.get("Guidance until")), model: known.get("Model"),
      guidance_rescale: number(known.get("Guidance rescale")),
      others: [...known.keys()].filter((key) => !A1111_READ.includes(key)),
    }),
    source: "A1111",
  };
}

function pairs(line) {
  const found = new Map();
  for (const [, key, value] of line.matchAll(/([^:,]+): *("(?:\\.|[^"\\])*"|[^,]*)(?:,\s*|$)/g)) {
    found.set(key.trim(), unquoted(value));
  }
  return found;
}

function unquoted(value) {
  try {
    return value.startsWith('"') ? JSON.parse(value) : value;
  } catch {
    return value;
  }
}

const number = (text) => (text ? Number(text) : undefined);

const fromKoala = (text) => settingsOf(parsed(text), "koala");

const INVOKE_READ = [
  "positive_prompt", "negative_prompt", "seed", "steps", "cfg_scale", "scheduler", "width",
  "height", "strength", "loras", "model", "app_version", "generation_mode", "rand_device",
];

/** The settings in InvokeAI's JSON. */
function fromInvoke(text) {
  const found = parsed(text);
  if (!found) return null;
  const loras = (Array.isArray(found.loras) ? found.loras : [])
    .map((one) => [one?.model?.name ?? one?.lora?.model_name, one?.weight]);
  const others = Object.entries(found)
    .filter(([name, value]) => !INVOKE_READ.includes(name) && !isEmpty(value)).map(([name]) => name);
  return settingsOf({
    prompt: found.positive_prompt, negative_prompt: found.negative_prompt, seed: found.seed,
    steps: found.steps, guidance: found.cfg_scale, sampler: found.scheduler, width: found.width,
    height: found.height, strength: found.strength, loras, others,
    model: found.model?.name ?? found.model?.model_name,
  }, "InvokeAI");
}

const isEmpty = (value) =>
  value === null || value === "" || value === false || (Array.isArray(value) && !value.length);

const TEXTS = [
  "prompt", "negative_prompt", "sampler", "schedule", "model", "image", "mask", "mask_fill",
];
const NUMBERS = [
  "steps", "guidance", "guidance_until", "guidance_rescale", "seed", "width", "height", "strength",
  "mask_blur",
];

/** The values that have the right type. */
function sound(values) {
  const result = {};
  for (const name of TEXTS) if (typeof values[name] === "string") result[name] = values[name];
  for (const name of NUMBERS) if (Number.isFinite(values[name])) result[name] = values[name];
  const others = Array.isArray(values.others) ? values.others : [];
  result.others = others.filter((one) => typeof one === "string");
  const loras = Array.isArray(values.loras) ? values.loras : [];
  result.loras = loras.filter(
    (one) => Array.isArray(one) && typeof one[0] === "string" && Number.isFinite(one[1]),
  );
  return result;
}
