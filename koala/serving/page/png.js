// The generation settings in a PNG: our own JSON, else the text format of AUTOMATIC1111's web UI,
// which most tools write. Files are untrusted: no length in them is.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MOST_TEXT = 1 << 20; // bytes of one decompressed text

/**
 * The settings in a PNG's bytes: {prompt, negative_prompt, steps, guidance, guidance_until, seed,
 * width, height, sampler, strength, loras: [[name, scale]], image, source}; only what is known is
 * there. null for a file that holds none.
 */
export async function readSettings(buffer) {
  const texts = await readTexts(buffer);
  return fromKoala(texts.get("koala")) ?? fromA1111(texts.get("parameters"));
}

/** The text chunks of a PNG by keyword; empty for other files. Broken chunks are skipped. */
export async function readTexts(buffer) {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  const texts = new Map();
  if (SIGNATURE.some((byte, i) => bytes[i] !== byte)) return texts;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = latin1(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (data.length < length || type === "IEND") break;
    try {
      const found = await textOf(type, data);
      if (found && !texts.has(found[0])) texts.set(found[0], found[1]);
    } catch {
      // skip a broken chunk
    }
    at += 12 + length;
  }
  return texts;
}

/** [keyword, text] of a text chunk, else null. */
async function textOf(type, data) {
  if (type !== "tEXt" && type !== "zTXt" && type !== "iTXt") return null;
  const end = data.indexOf(0);
  if (end < 1) return null;
  const keyword = latin1(data.subarray(0, end));
  let rest = data.subarray(end + 1);
  if (type === "tEXt") return [keyword, latin1(rest.subarray(0, MOST_TEXT))];
  if (type === "zTXt") return [keyword, latin1(await inflated(rest.subarray(1)))];
  const packed = rest[0] === 1;
  rest = rest.subarray(2);
  for (let skipped = 0; skipped < 2; skipped++) rest = rest.subarray(rest.indexOf(0) + 1);
  const utf8 = packed ? await inflated(rest) : rest.subarray(0, MOST_TEXT);
  return [keyword, new TextDecoder().decode(utf8)];
}

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const reader = stream.getReader();
  const parts = [];
  for (let size = 0; ; ) {
    const { value, done } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    size += value.length;
    if (size > MOST_TEXT) throw new RangeError("text too long");
  }
}

function latin1(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}

function fromKoala(text) {
  let values;
  try {
    values = JSON.parse(text);
  } catch {
    return null;
  }
  if (typeof values?.prompt !== "string") return null;
  return { ...sound(values), source: "koala" };
}

/** The settings in AUTOMATIC1111's text: prompt, negative prompt, then a list of "Key: value". */
export function fromA1111(text) {
  if (typeof text !== "string") return null;
  const lines = text.trim().split("\n");
  if (!/^Steps: \d/.test(lines.at(-1))) return null;
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

const TEXTS = ["prompt", "negative_prompt", "sampler", "model", "image"];
const NUMBERS = [
  "steps", "guidance", "guidance_until", "seed", "width", "height", "strength",
];

/** The values that have the right type. */
function sound(values) {
  const result = {};
  for (const name of TEXTS) if (typeof values[name] === "string") result[name] = values[name];
  for (const name of NUMBERS) if (Number.isFinite(values[name])) result[name] = values[name];
  const loras = Array.isArray(values.loras) ? values.loras : [];
  result.loras = loras.filter(
    (one) => Array.isArray(one) && typeof one[0] === "string" && Number.isFinite(one[1]),
  );
  return result;
}
