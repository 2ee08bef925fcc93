"""What a person may ask of the pipeline; all else is refused before any work, in one line."""

import math
import re
import secrets
from pathlib import Path

from koala.errors import UserError

SMALLEST, LARGEST = 16, 4096  # pixels a side
MOST_STEPS = 1000
MOST_GUIDANCE = 100
MOST_SEED = 2**63 - 1
MOST_LORA_SCALE = 100


def prompts(prompt: str | list[str]) -> list[str]:
    """The prompts as a list; UserError if there is none, or one says nothing."""
    found = [prompt] if isinstance(prompt, str) else list(prompt)
    if not found:
        raise UserError("no prompt: give at least one, such as 'a red fox, noto style'")
    for one in found:
        _text(one, "prompt")
        if not one.strip():
            raise UserError(f"the prompt is empty ({one!r}): say what to draw, 'a red fox'")
    return found


def negative_prompt(text: str, guidance: float) -> None:
    """UserError for a negative prompt that could not have an effect."""
    _text(text, "negative prompt")
    if text and guidance <= 1:
        raise UserError(
            f"the negative prompt {text!r} has no effect at guidance {guidance}: "
            "leave it out, or set guidance above 1"
        )


def numbers(steps: int, guidance: float, number: int) -> None:
    """UserError unless steps, guidance and the number of pictures are in their ranges."""
    if not _whole(steps) or not 1 <= steps <= MOST_STEPS:
        raise UserError(
            f"steps is {steps!r}: allowed are whole numbers from 1 to {MOST_STEPS}, 10 is usual"
        )
    numeric = isinstance(guidance, (int, float)) and not isinstance(guidance, bool)
    if not numeric or not math.isfinite(guidance) or not 0 <= guidance <= MOST_GUIDANCE:
        raise UserError(
            f"guidance is {guidance!r}: allowed are numbers from 0 to {MOST_GUIDANCE}, 3.5 is usual"
        )
    if not _whole(number) or number < 1:
        raise UserError(f"the number of pictures is {number!r}: allowed are whole numbers from 1")


def size(asked: tuple[int, int] | str | None, native: int, factor: int) -> tuple[int, int]:
    """(width, height) in pixels, each a multiple of the VAE's `factor`.

    That suffices: where a U-Net's downsampling does not divide the latent, diffusers' passes
    the sizes on to the upsampling.
    """
    rule = (
        f"allowed are multiples of {factor} from {SMALLEST} to {LARGEST}, such as {native}x{native}"
    )
    if asked is None:
        return native, native
    if isinstance(asked, str):
        match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", asked.strip(), re.ASCII)
        if match is None:
            raise UserError(f"size {asked!r} is not WIDTHxHEIGHT: {rule}")
        asked = (int(match[1]), int(match[2]))
    if len(asked) != 2 or not all(_whole(side) for side in asked):
        raise UserError(f"size {asked!r} is not (width, height) in pixels: {rule}")
    width, height = asked
    if any(side % factor or not SMALLEST <= side <= LARGEST for side in (width, height)):
        raise UserError(f"size {width}x{height}: {rule}")
    return width, height


def seed(asked: int | None, pictures: int) -> int:
    """The first picture's seed: the one asked for, or a random one of 32 bits."""
    if asked is None:
        return secrets.randbelow(2**32)
    if not _whole(asked) or not 0 <= asked <= MOST_SEED - (pictures - 1):
        raise UserError(
            f"seed is {asked!r}: allowed are whole numbers from 0 to 2**63 - {pictures} "
            f"(picture i of {pictures} takes seed + i)"
        )
    return asked


def lora_scale(asked: float) -> float:
    """UserError unless a LoRA's scale is in its range; negative ones turn it round."""
    numeric = isinstance(asked, (int, float)) and not isinstance(asked, bool)
    if not numeric or not abs(asked) <= MOST_LORA_SCALE:
        raise UserError(
            f"LoRA scale is {asked!r}: allowed are numbers from -{MOST_LORA_SCALE} to "
            f"{MOST_LORA_SCALE}, 1 is usual"
        )
    return float(asked)


def lora(asked: str) -> tuple[str, float]:
    """(file, scale) of "FILE" or "FILE:SCALE"; without a scale it is 1."""
    file, _, scale = asked.rpartition(":")
    if re.fullmatch(r"[-+]?\d*\.?\d+", scale, re.ASCII) and not Path(asked).exists():
        return file, lora_scale(float(scale))
    return asked, 1.0


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: object, what: str) -> None:
    """UserError unless `value` is text that UTF-8 can hold: files and tokenizers need that."""
    if not isinstance(value, str):
        raise UserError(f"the {what} is {value!r}: allowed is text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"the {what} {value!r} holds half a character (a lone surrogate): type it again"
        ) from None
