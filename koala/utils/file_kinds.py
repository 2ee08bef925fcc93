"""What a file is that is given for an image and is none that can be read, by its first bytes."""

from __future__ import annotations

from pathlib import Path

START = 512  # bytes that are looked at
_MARKS = (  # place, bytes there, what the file is; the first match wins
    (4, b"ftypavif", "an AVIF that cannot be decoded here"),
    (4, b"ftypavis", "an AVIF sequence"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftyphev", "a HEIC sequence"),
    (4, b"ftypmif1", "a HEIF"),
    (4, b"ftypmsf1", "a HEIF sequence"),
    (4, b"ftypcrx", "a camera's raw file (CR3)"),
    (4, b"ftyp", "a video"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (4, b"JXL ", "a JPEG XL"),
    (4, b"jP  ", "a JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (8, b"CR\x02", "a camera's raw file (CR2)"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)"),
    (0, b"IIRO", "a camera's raw file (ORF)"),
    (0, b"IIU\0", "a camera's raw file (RW2)"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"gimp xcf", "a GIMP document"),
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"v/1\x01", "an OpenEXR"),
    (0, b"#?RADIANCE", "a Radiance HDR"),
    (0, b"\0\0\x01\0", "an icon (ICO)"),
    (0, b"icns", "an icon (ICNS)"),
    (0, b"DDS ", "a DDS texture"),
    (0, b"qoif", "a QOI"),
    (0, b"PK\x03\x04", "a ZIP archive, as Krita's and OpenRaster's documents are"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
    (0, b"\x89PNG", "a damaged PNG"),
    (0, b"\xff\xd8\xff", "a damaged JPEG"),
    (0, b"GIF8", "a damaged GIF"),
    (8, b"WEBP", "a damaged WebP"),
)
_RAW = (".dng", ".nef", ".arw", ".cr2", ".cr3", ".orf", ".raf", ".rw2", ".pef", ".srw")


def kind_of(start: bytes, name: str = "") -> str:
    """Such as "a HEIC", of a file's first bytes and its name; "" if it is not known."""
    if not start:
        return "empty"
    for place, mark, kind in _MARKS:
        if start[place : place + len(mark)] == mark:
            return kind
    if (suffix := Path(name).suffix.lower()) in _RAW:
        return f"a camera's raw file ({suffix[1:].upper()})"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    return ""
