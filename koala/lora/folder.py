"""A folder of LoRAs that prompts and requests may name."""

import re
from pathlib import Path

from koala.errors import UserError, unknown

_NAME = re.compile(r"\w[\w .+-]{0,127}")


def lora_names(folder: Path | None) -> list[str]:
    """The names that may be used: of its files, without .safetensors."""
    if folder is None:
        return []
    return sorted(f.stem for f in folder.glob("*.safetensors") if _NAME.fullmatch(f.stem))


def lora_file(folder: Path, name: str) -> Path:
    """The file of a name. UserError if the folder has none."""
    if name not in (names := lora_names(folder)):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give one that holds LoRAs")
        raise unknown("LoRA", name, names)
    return folder / f"{name}.safetensors"


def check_file(file: Path) -> None:
    """UserError for a folder or an address where a LoRA's file is wanted."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(file), re.IGNORECASE):
        raise UserError(f"{file} is an address: download the LoRA, and name its file by its path")
    if file.is_dir():
        there = sorted(file.glob("*.safetensors"))
        example = f", such as {there[0]}" if there else "; it holds no .safetensors file"
        raise UserError(f"{file} is a folder: name a LoRA's file{example}")
