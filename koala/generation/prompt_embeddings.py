"""Textual inversions named in prompts, as in AUTOMATIC1111's web UI: by a file's name as a word.

Importing this loads no torch.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from koala.errors import UserError


def split_names(text: str, names: Collection[str]) -> list[str]:
    """The text in pieces: those at odd places are names, in any case; longer ones win."""
    if not names:
        return [text]
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.split(rf"(?<!\w)({words})(?!\w)", text, flags=re.IGNORECASE)


def named_embeddings(
    texts: Sequence[str], files: Sequence[str | Path], folder: Path | None
) -> tuple[Path, ...]:
    """The embeddings that the prompts name: of `files`, and of those in the folder.

    UserError for one of `files` that no prompt names, or a name that two files have.
    """
    given = [Path(file).expanduser() for file in files]
    there = [] if folder is None else sorted(folder.glob("*.safetensors"))
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that holds embeddings")
    by_name: dict[str, Path] = {}
    for file in given:
        if file.stem.lower() in by_name:
            raise UserError(f"two embeddings are called {file.stem!r}: rename one")
        by_name[file.stem.lower()] = file
    for file in there:
        by_name.setdefault(file.stem.lower(), file)
    used = {name.lower() for text in texts for name in split_names(text, by_name)[1::2]}
    if unused := [file for file in given if file.stem.lower() not in used]:
        raise UserError(
            f"embedding {unused[0]} is named in no prompt: write {unused[0].stem!r} where it shall "
            "stand, or leave it out"
        )
    return tuple(file for name, file in by_name.items() if name in used)
