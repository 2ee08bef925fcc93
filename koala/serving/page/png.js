// The texts in a PNG. Files are untrusted: no length in them is.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MOST_TEXT = 1 << 20; // bytes of one decompressed text

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
