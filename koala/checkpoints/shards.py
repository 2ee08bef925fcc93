"""A shard of a model that was written in several files, given as if it were the model."""

from __future__ import annotations

import re
from pathlib import Path

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def shard_of(file: Path) -> str:
    """ "shard 1 of 2 of a model: give the folder X", by the file's name; "" for a whole file."""
    found = _SHARD.fullmatch(file.name)
    if not found or int(found[3]) < 2:
        return ""
    what = f"shard {int(found[2])} of {int(found[3])} of a model"
    folder, index = file.parent, f"{found[1]}.safetensors.index.json"
    if (folder.parent / "model_index.json").is_file():
        folder = folder.parent
    elif not (folder / "config.json").is_file():
        return f"{what}: give the model's folder, in which {index} and the other shards lie"
    return f"{what}: give the folder {folder}"
