"""A folder of LoRAs that prompts and requests may name."""

import re
from collections import Counter
from pathlib import Path

from koala.errors import UserError, unknown

_UNNAMEABLE = re.compile(r"[<>:\x00-\x1f]")  # a prompt's <lora:NAME:SCALE> cannot hold them


def lora_names(folder: Path | None) -> list[str]:
    """The names that may be used: of its files, without .safetensors.

    Files of folders within it count too; where two have one name, these are named by their paths.
    """
    return sorted(_by_name(folder))


def lora_file(folder: Path, name: str) -> Path:
    """The file of a name, which may have its ending. UserError if the folder has none."""
    name = name.strip()
    if (file := (files := _by_name(folder)).get(name)) is None:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give one that holds LoRAs")
        file = files.get(re.sub(r"\.safetensors$", "", name, flags=re.IGNORECASE))
    if file is None:
        raise unknown("LoRA", name, sorted(files))
    return file


def _by_name(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".safetensors")
    within = {path: path.relative_to(folder).with_suffix("") for path in paths}
    number = Counter(inside.name for inside in within.values())
    named = {
        inside.name if number[inside.name] == 1 or len(inside.parts) == 1 else inside.as_posix(): p
        for p, inside in within.items()
        if not any(part.startswith(".") for part in inside.parts)
    }
    return {name: path for name, path in named.items() if not _UNNAMEABLE.search(name)}


def check_file(file: Path) -> None:
    """UserError for a folder or an address where a LoRA's file is wanted."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(file), re.IGNORECASE):
        raise UserError(f"{file} is an address: download the LoRA, and name its file by its path")
    if file.is_dir():
        there = sorted(file.glob("*.safetensors")) or sorted(file.glob("lora/*.safetensors"))
        example = f", such as {there[0]}" if there else "; it holds no .safetensors file"
        raise UserError(f"{file} is a folder: name a LoRA's file{example}")
