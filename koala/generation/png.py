"""PNG files with the settings of their images. Importing this loads no torch.

Each says in XMP that a model made it. The settings are stored twice: as "parameters", the text of
AUTOMATIC1111's web UI, which other interfaces read when an image is dropped on them, and as
"koala", our JSON, which is complete.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, PngImagePlugin

from koala.errors import UserError
from koala.generation.image_files import UNREADABLE
from koala.generation.provenance import PNG_KEY, XMP
from koala.generation.requests import Settings
from koala.generation.samplers import LABELS
from koala.generation.workflow import workflow
from koala.utils.atomic import new_file

if TYPE_CHECKING:
    from koala.generation.drawing import Result

# AUTOMATIC1111's names of what a repainted part starts from; "original" is not said.
MASKED_CONTENT = {"surroundings": "fill", "noise": "latent noise", "nothing": "latent nothing"}
LONGEST_STEM = 48  # letters of a prompt in a file's name
_PROGRAMS = {  # program -> names of texts that it alone writes
    "Fooocus": ("fooocus_scheme",),
    "InvokeAI": ("invokeai_metadata", "invokeai_graph", "sd-metadata", "Dream"),
    "ComfyUI": ("workflow", "prompt"),
}
# Suffixes of image files: --out with one of them names a file, not a folder.
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def check_writable(out: str | Path, images: int = 1) -> None:
    """UserError unless `save` can write so many images to `out`. Leaves nothing there."""
    named = _named(Path(out), images)
    folder = (named[0].parent if named else Path(out)).absolute()
    standing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=standing):
            pass
    except OSError as error:
        raise _unwritable(out, error) from error


def save(
    result: Result, out: str | Path, stem: str | None = None, comfyui: bool = False
) -> list[Path]:
    """Writes each image as a PNG and returns the paths, in order.

    out: a folder, or a file such as fox.png; several images become fox-1.png, fox-2.png and so
    on. stem: of the files in a folder, `stem`-NNNN.png; by default each is named after its prompt.
    comfyui: put a workflow for ComfyUI into each (`koala.generation.workflow`).
    Numbers continue from the highest that exists, so no file is replaced. A file is written as a
    whole or not at all. UserError for a file that exists or cannot be written; Failure if the disk
    is full.
    """
    if stem is not None and (not stem or Path(stem).name != stem):
        raise UserError(f"file name {stem!r}: allowed is a plain name without folders")
    named = _named(Path(out), len(result.images))
    folder = named[0].parent if named else Path(out)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, (image, settings) in enumerate(zip(result.images, result.settings, strict=True)):
            path = named[i] if named else _next_path(folder, stem or _slug(settings.prompt))
            _write(image, settings, path, comfyui)
            paths.append(path)
    except OSError as error:
        raise _unwritable(out, error) from error
    return paths


def _named(out: Path, images: int) -> list[Path]:
    """The files that `out` names for so many images; none if it is a folder."""
    if out.is_dir() or out.suffix.lower() not in IMAGES:
        return []
    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: pictures are written as PNG; name it {out.with_suffix('.png')}")
    numbers = range(1, images + 1)
    files = [out] if images == 1 else [out.with_stem(f"{out.stem}-{i}") for i in numbers]
    for file in files:
        if os.path.lexists(file):
            raise UserError(f"{file} exists; name another file, or a folder, which is added to")
    return files


def read_settings(path: str | Path | IO[bytes]) -> Settings:
    """The settings an image was made with. UserError for a file without them."""
    try:
        with Image.open(path) as image:
            text = image.info.get("koala")
            program = "" if text is not None else _program(image)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    names = {field.name for field in fields(Settings)}
    later = {field.name for field in fields(Settings) if field.default is not MISSING}
    try:
        values = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        values = None
    if text is None and program:
        raise UserError(
            f"{path} holds settings of {program}, which are not read here: give a PNG that koala "
            "wrote and nobody changed"
        )
    if not isinstance(values, dict) or not names - later <= set(values) <= names:
        raise UserError(
            f"{path} holds no settings of koala's: give a PNG that koala wrote and nobody changed"
        )
    try:
        values["loras"] = tuple((name, scale) for name, scale in values.get("loras", ()))
        values["embeddings"] = tuple(values.get("embeddings", ()))
    except (TypeError, ValueError):
        raise UserError(f"{path} holds settings that koala did not write") from None
    return Settings(**values)


def _program(image: Image.Image) -> str:
    """The program whose settings an image's texts hold; "" if none is known."""
    texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
    told = texts.get("parameters") or _comment(image)
    for program, marks in _PROGRAMS.items():
        if any(mark in texts for mark in marks):
            return program
    if "NovelAI" in texts.get("Software", "") or "NovelAI" in texts.get("Title", ""):
        return "NovelAI"
    if "sui_image_params" in told:
        return "SwarmUI"
    if "Version: koala" in told or 'Version: "koala' in told:
        return "koala as text alone, without those that are complete"
    if "Steps: " in told:
        return "AUTOMATIC1111's web UI or a program like it"
    return "Fooocus" if "base_model_hash" in told else ""


def _comment(image: Image.Image) -> str:
    """The EXIF comment of a JPEG or WebP, in which programs put what a PNG has as text."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        comment = exif.get_ifd(0x8769).get(0x9286, b"")
    except (*UNREADABLE, struct.error, KeyError):  # damaged: it tells nothing
        return ""
    told = comment if isinstance(comment, bytes) else b""
    return told[8:].replace(b"\0", b"").decode("utf-8", "replace")


def parameters(settings: Settings) -> str:
    """The settings as AUTOMATIC1111's text."""
    values = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "Schedule type": LABELS[settings.schedule],
        "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": _quoted(settings.model),
        "Version": _quoted(f"koala {settings.version}"),
    }
    if settings.image:
        values["Denoising strength"] = f"{settings.strength:g}"
    if settings.mask:
        values["Mask blur"] = settings.mask_blur
        if settings.mask_fill in MASKED_CONTENT:
            values["Masked content"] = MASKED_CONTENT[settings.mask_fill]
        if settings.pasted:
            values["Inpaint area"] = "Only masked"
    if settings.guidance_until < 1:
        values["Guidance until"] = f"{settings.guidance_until:g}"
    if settings.guidance_rescale:
        values["CFG Rescale"] = f"{settings.guidance_rescale:g}"
    if settings.control:
        values["ControlNet 0"] = _quoted(
            f"Model: {settings.control}, Weight: {settings.control_scale:g}"
        )
    if settings.ip_adapter:
        values["IP-Adapter"] = _quoted(
            f"Model: {settings.ip_adapter}, Weight: {settings.ip_scale:g}"
        )
    loras = "".join(f" <lora:{name}:{scale:g}>" for name, scale in settings.loras)
    lines = [settings.prompt + loras]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in values.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """The value, quoted if it holds one of the format's separators."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n\"]", value) else value


def write_png(
    image: Image.Image, settings: Settings, file: IO[bytes], comfyui: bool = False
) -> None:
    """Writes an image as PNG, with its settings, to an open file; `comfyui` as in `save`."""
    info = PngImagePlugin.PngInfo()
    _add(info, "parameters", parameters(settings))
    _add(info, "koala", json.dumps(asdict(settings)))
    info.add_itxt(PNG_KEY, XMP)
    if comfyui:
        _add(info, "prompt", json.dumps(workflow(settings)))  # where ComfyUI looks for it
    image.save(file, format="PNG", pnginfo=info)


def _write(image: Image.Image, settings: Settings, path: Path, comfyui: bool) -> None:
    with new_file(path) as part, part.open("wb") as file:
        write_png(image, settings, file, comfyui)


def _add(info: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """Adds a tEXt chunk for ASCII, which most readers expect; else iTXt, which is UTF-8."""
    if text.isascii():
        info.add_text(key, text)
    else:
        info.add_itxt(key, text)


def _slug(prompt: str) -> str:
    """A file name of the prompt's Latin letters and digits, joined by dashes."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:LONGEST_STEM].rstrip("-") or "picture"


def _next_path(folder: Path, stem: str) -> Path:
    pattern = re.compile(re.escape(stem) + r"-(\d+)\.png", re.ASCII | re.IGNORECASE)
    matches = (pattern.fullmatch(name) for name in os.listdir(folder))
    last = max((int(match[1]) for match in matches if match), default=0)
    return folder / f"{stem}-{last + 1:04d}.png"


def _unwritable(out_dir: str | Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {out_dir} ({error.strerror or error}): name a folder you may write to"
    )
