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
