// Several files in one: a ZIP without compression, since PNGs are compressed already.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/** A ZIP of [name, ArrayBuffer] pairs, as a Blob. */
export function zipped(files) {
  const [parts, entries] = [[], []];
  let at = 0;
  for (const [name, content] of files) {
    const [bytes, path] = [new Uint8Array(content), new TextEncoder().encode(name)];
    // Version 2.0, names in UTF-8, stored, 1 January 1980.
    const facts = [20, 0x800, 0, 0, 0x21];
    const sizes = [crc32(bytes), bytes.length, bytes.length];
    const local = record(0x04034b50, facts, sizes, [path.length, 0]);
    parts.push(local, path, bytes);
    entries.push(
      record(0x02014b50, [20, ...facts], sizes, [path.length, 0, 0, 0, 0], [0, at]), path,
    );
    at += local.length + path.length + bytes.length;
  }
  const size = entries.reduce((sum, part) => sum + part.length, 0);
  const end = record(0x06054b50, [0, 0, files.length, files.length], [size, at], [0]);
  return new Blob([...parts, ...entries, end], { type: "application/zip" });
}

/** A signature, then lists of numbers, in turn of 2 and 4 bytes each. */
function record(signature, ...lists) {
  const numbers = [[signature, 4]];
  lists.forEach((list, i) => numbers.push(...list.map((n) => [n, i % 2 ? 4 : 2])));
  const view = new DataView(new ArrayBuffer(numbers.reduce((sum, [, n]) => sum + n, 0)));
  let at = 0;
  for (const [value, bytes] of numbers) {
    if (bytes === 4) view.setUint32(at, value, true);
    else view.setUint16(at, value, true);
    at += bytes;
  }
  return new Uint8Array(view.buffer);
}

/** Saves a Blob as a download. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
