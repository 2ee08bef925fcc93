// The user comment in a JPEG's or WebP's EXIF, where AUTOMATIC1111's web UI keeps its settings.

const [EXIF_IFD, USER_COMMENT] = [0x8769, 0x9286];
const MOST = 1 << 20; // bytes of a comment

/** The text; null where there is none, or the file is broken. */
export function userComment(buffer) {
  try {
    const tiff = inJpeg(new DataView(buffer)) ?? inWebp(new DataView(buffer));
    return tiff && comment(tiff);
  } catch (error) {
    if (error instanceof RangeError) return null; // an offset beyond the file
    throw error;
  }
}

/** The EXIF block of a JPEG, without its "Exif" mark. */
function inJpeg(view) {
  if (view.byteLength < 4 || view.getUint16(0) !== 0xffd8) return null;
  for (let at = 2; at + 4 <= view.byteLength; ) {
    const [marker, length] = [view.getUint16(at), view.getUint16(at + 2)];
    if (marker < 0xffe0 || marker === 0xffda || length < 2) return null;
    if (marker === 0xffe1 && length > 8 && view.getUint32(at + 4) === 0x45786966) {
      return part(view, at + 10, length - 8);
    }
    at += 2 + length;
  }
  return null;
}

/** The EXIF chunk of a WebP. */
function inWebp(view) {
  if (view.byteLength < 16 || view.getUint32(8) !== 0x57454250) return null;
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    if (view.getUint32(at) === 0x45584946) {
      const marked = length > 6 && view.getUint32(at + 8) === 0x45786966;
      return part(view, at + 8 + (marked ? 6 : 0), length - (marked ? 6 : 0));
    }
    at += 8 + length + (length & 1);
  }
  return null;
}

const part = (view, from, length) => new DataView(view.buffer, from, length);

function comment(tiff) {
  const little = tiff.getUint16(0) === 0x4949;
  const exif = entry(tiff, tiff.getUint32(4, little), EXIF_IFD, little);
  const at = exif && entry(tiff, tiff.getUint32(exif + 8, little), USER_COMMENT, little);
  if (!at) return null;
  const length = tiff.getUint32(at + 4, little);
  const from = tiff.getUint32(at + 8, little);
  if (length <= 8 || length > MOST) return null;
  const bytes = new Uint8Array(tiff.buffer, tiff.byteOffset + from, length);
  const [code, text] = [bytes.subarray(0, 8), bytes.subarray(8)];
  if (code[0] !== 0x55) return new TextDecoder().decode(text); // not "UNICODE"
  const wide = text.length > 1 && text[0] === 0; // big-endian, as piexif writes it
  return new TextDecoder(wide ? "utf-16be" : "utf-16le").decode(text);
}

/** Where a tag's entry is in a directory; 0 if it has none. */
function entry(tiff, directory, tag, little) {
  const count = tiff.getUint16(directory, little);
  for (let i = 0; i < count; i++) {
    const at = directory + 2 + 12 * i;
    if (tiff.getUint16(at, little) === tag) return at;
  }
  return 0;
}
