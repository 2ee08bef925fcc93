"""LoRAs named in a prompt, as in AUTOMATIC1111's web UI: <lora:NAME:SCALE>, or <lora:NAME> for 1.

<lyco:NAME:SCALE>, which its extension for LyCORIS read, is the same.

Importing this loads no torch.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from koala.errors import UserError
from koala.generation.validation import lora_scale
from koala.lora.folder import lora_file

_LORA = re.compile(r"<\s*(?:lora|lyco)\s*:([^:<>]+)(?::([^:<>]+))?>", re.IGNORECASE)
_OTHER = re.compile(  # tags of other programs, and LoRAs that are not closed or in wide letters
    r"[<\uff1c]\s*(?:"
    r"(?:lora|lyco|hypernet)\s*[:\uff1a][^<>\s:\uff1a]*(?:[>\uff1e]|[:\uff1a][^<>\s\uff1e]*[>\uff1e]?)"
    r"|\w+(?:\[[^\]]*\])?\s*:[^<>]*>)",
    re.IGNORECASE,
)


def split_loras(prompt: str, folder: Path | None) -> tuple[str, dict[Path, float]]:
    """The prompt without its LoRAs, and their files in `folder` with their scales.

    UserError for a LoRA that is not there or is named twice, a bad scale, and other kinds of
    networks.
    """
    found: dict[Path, float] = {}
    for match in _LORA.finditer(prompt):
        name, scale = match[1], match[2] or "1"
        if folder is None:
            raise UserError(
                f"{match[0]} names a LoRA, but there is no LoRA folder: give one with --lora-dir, "
                "or leave it out"
            )
        try:
            number = float(scale)
        except ValueError:
            raise UserError(
                f"{match[0]}: the scale {scale!r} is not a number; write <lora:{name}:0.8>"
            ) from None
        file = lora_file(folder, name)
        if file in found:
            raise UserError(f"the prompt names the LoRA {name!r} twice: name each once")
        found[file] = lora_scale(number)
    left = _LORA.sub("", prompt)
    if other := _OTHER.search(left):
        raise UserError(f"{other[0]} is not supported: use <lora:NAME:SCALE>")
    return (left.strip() if found else prompt), found


def refuse_loras(negative_prompt: str) -> None:
    """UserError for a negative prompt that names a LoRA."""
    if (found := _OTHER.search(negative_prompt)) and not _LORA.search(negative_prompt):
        raise UserError(f"{found[0]} is not supported: use <lora:NAME:SCALE> in the prompt")
    if found:
        raise UserError(f"{found[0]} has no effect in the negative prompt: put it into the prompt")


def shared_loras(
    prompts: Sequence[str], folder: Path | None
) -> tuple[list[str], dict[Path, float]]:
    """`split_loras` of several prompts, if they name the same LoRAs: the model can then have them.

    Otherwise the prompts as they are, and none. UserError as there, and for a folder that is none.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--lora-dir {folder} is not a folder: give one that holds LoRAs")
    split = [split_loras(prompt, folder) for prompt in prompts]
    first = split[0][1]
    if any(files != first for _, files in split):
        return list(prompts), {}
    return [text for text, _ in split], first
