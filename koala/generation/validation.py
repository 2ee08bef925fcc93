"""What a person may ask of the pipeline; all else is refused before any work, in one line."""

import math
import re
import secrets
import unicodedata
from pathlib import Path

from koala.errors import UserError

SMALLEST, LARGEST = 16, 4096  # pixels a side
MOST_STEPS = 1000
MOST_PICTURES = 10_000  # of all prompts together
MOST_GUIDANCE = 100
MOST_SEED = 2**63 - 1
MOST_LORA_SCALE = 100
LONGEST_TEXT = 10_000  # characters
STRENGTH = 0.6  # where a picture is given and no strength


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
    if not _number(guidance) or not 0 <= guidance <= MOST_GUIDANCE:
        raise UserError(
            f"guidance is {guidance!r}: allowed are numbers from 0 to {MOST_GUIDANCE}, 3.5 is usual"
        )
    if not _whole(number) or not 1 <= number <= MOST_PICTURES:
        raise UserError(
            f"the number of pictures is {number!r}: allowed are whole numbers from 1 to "
            f"{MOST_PICTURES:,}"
        )


def guidance_until(asked: float, guidance: float) -> float:
    """UserError unless it is a share of the steps, and there is guidance to cut off."""
    if not _number(asked) or not 0 < asked <= 1:
        raise UserError(
            f"guidance until is {asked!r}: allowed are shares of the steps above 0, up to 1 (all)"
        )
    if asked < 1 and guidance <= 1:
        raise UserError(
            f"guidance until {asked:g} has no effect at guidance {guidance}: leave it out, or set "
            "guidance above 1"
        )
    return float(asked)


def strength(asked: float | None, picture: bool, mask: bool) -> float:
    """The share of the steps to do: 1 without a picture. UserError for one that is no share."""
    if mask and not picture:
        raise UserError("a mask needs the picture that it is for: give an image as well")
    if asked is None:
        return STRENGTH if picture else 1.0
    if not picture:
        raise UserError(f"strength {asked!r} has no effect without a picture: give an image")
    if not _number(asked) or not 0 < asked <= 1:
        raise UserError(
            f"strength is {asked!r}: allowed are numbers above 0 (the picture as it is), up to 1 "
            f"(all anew); {STRENGTH:g} is usual"
        )
    return float(asked)


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


def _number(value: object) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: object, what: str) -> None:
    """UserError unless `value` is text of a sane length that UTF-8 can hold, without controls."""
    if not isinstance(value, str):
        raise UserError(f"the {what} is {value!r}: allowed is text")
    if len(value) > LONGEST_TEXT:
        raise UserError(
            f"the {what} has {len(value):,} characters: allowed are {LONGEST_TEXT:,}; say less"
        )
    controls = {c for c in value if unicodedata.category(c) == "Cc"} - set("\t\n\r")
    if controls:
        named = ", ".join(f"U+{ord(c):04X}" for c in sorted(controls))
        raise UserError(f"the {what} holds control characters ({named}): leave them out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"the {what} {value!r} holds half a character (a lone surrogate): type it again"
        ) from None
