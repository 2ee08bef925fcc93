"""Checks of a user's arguments: one line for each mistake, before any work is done.

Importing this loads no torch.
"""

import math
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koala.architectures.table import FACTOR
from koala.checkpoints.prediction import of_config
from koala.checkpoints.tensors import DTYPES
from koala.errors import UserError, unknown

EXACT = ("torch", "openvino")  # backends that give the same picture within 1e-4
ROUNDED = ("torch-bf16", "openvino-bf16", "openvino-int8")
BACKENDS = (*EXACT, *ROUNDED, "auto", "fastest", "remembered")
WEIGHTS = (*DTYPES, "int8", "fp8", "int4")
DECODERS = ("full", "tiled", "tiny")
SMALLEST, LARGEST = 16, 4096  # pixels a side
FAR = 1.5  # factor of the native area, up or down, within which a model draws as it should
MOST_STEPS = 1000
MOST_IMAGES = 10_000  # of all prompts
MOST_GUIDANCE = 100
MOST_SEED = 2**63 - 1
MOST_LORA_SCALE = 100
LONGEST_TEXT = 10_000  # characters
MASK_BLUR = 4  # default, pixels
MOST_MASK_BLUR = 64
MASK_FILLS = ("original", "surroundings", "noise", "nothing")
MOST_CONTROL = 2  # scale of a ControlNet
MOST_IP_SCALE = 2  # of an IP-Adapter
STRENGTH = 0.6  # default for an image without a strength
PRUNED = (0.01, 0.6)  # share of a U-Net's parameters that pruning can be asked for
MOST_CALIBRATION = 256  # prompts
LCM_LEVELS = 50  # noise levels of latent consistency models (arXiv 2310.04378)


def prompts(prompt: str | list[str]) -> list[str]:
    """The prompts as a list. UserError if there is none, or one is empty."""
    found = [prompt] if isinstance(prompt, str) else list(prompt)
    if not found:
        raise UserError("no prompt: give at least one, such as 'a fox, noto style'")
    for one in found:
        _text(one, "prompt")
        if not one.strip():
            raise UserError(f"the prompt is empty ({one!r}): say what to draw, 'a red fox'")
    return found


def pruning(share: float, calibration: Sequence[str] | None) -> None:
    """UserError unless a U-Net can be pruned by that share on those prompts, if any."""
    least, most = PRUNED
    if not _number(share) or not least <= share <= most:
        raise UserError(f"--prune {share}: allowed are {least} to {most} of the U-Net's parameters")
    if calibration is not None:
        calibration_prompts(calibration)


def calibration_prompts(calibration: Sequence[str]) -> None:
    """UserError unless a U-Net can be calibrated on those prompts."""
    if len(prompts([*calibration])) > MOST_CALIBRATION:
        raise UserError(
            f"{len(calibration)} prompts to calibrate on: at most {MOST_CALIBRATION} are drawn"
        )


def negative_prompt(text: str, guidance: float, guided: bool) -> None:
    """UserError if it would have no effect. guided: whether the model is made for guidance."""
    _text(text, "negative prompt")
    if text and guidance <= 1:
        other = "set guidance above 1" if guided else "take a model with guidance, as koala-mini"
        raise UserError(
            f"the negative prompt {text!r} has no effect at guidance {guidance:g}: leave it out, "
            f"or {other}"
        )


def numbers(steps: int, guidance: float) -> None:
    """UserError unless steps and guidance are in range."""
    if not _whole(steps) or not 1 <= steps <= MOST_STEPS:
        raise UserError(
            f"steps is {steps!r}: allowed are whole numbers from 1 to {MOST_STEPS}, 10 is usual"
        )
    if not _number(guidance) or not 0 <= guidance <= MOST_GUIDANCE:
        raise UserError(
            f"guidance is {guidance!r}: allowed are numbers from 0 to {MOST_GUIDANCE}, 3.5 is usual"
        )


def number(asked: int) -> None:
    """UserError unless it is a number of images that may be drawn at once."""
    if not _whole(asked) or not 1 <= asked <= MOST_IMAGES:
        raise UserError(
            f"the number of pictures is {asked!r}: allowed are whole numbers from 1 to "
            f"{MOST_IMAGES:,}"
        )


def guidance_until(asked: float, guidance: float) -> float:
    """UserError unless it is a share of the steps and there is guidance to end."""
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


def strength(asked: float | None, image: bool, mask: bool) -> float:
    """The share of the steps to do: 1 without an image. UserError if out of range."""
    if mask and not image:
        raise UserError("a mask needs an image: give the image that it is for")
    if asked is None:
        return STRENGTH if image else 1.0
    if not image:
        raise UserError(f"strength {asked!r} has no effect without an image: give one")
    if not _number(asked) or not 0 < asked <= 1:
        raise UserError(
            f"strength is {asked!r}: allowed are numbers above 0 (keep the image), up to 1 "
            f"(redraw it); {STRENGTH:g} is usual"
        )
    return float(asked)


def mask_blur(asked: int | None, mask: bool) -> int:
    """Pixels over which a repainted part blends into its image; 0 without a mask. UserError."""
    if asked is None:
        return MASK_BLUR if mask else 0
    if not mask:
        raise UserError(f"mask blur {asked!r} has no effect without a mask: give one")
    if not _whole(asked) or not 0 <= asked <= MOST_MASK_BLUR:
        raise UserError(
            f"mask blur is {asked!r}: allowed are whole numbers of pixels from 0 to "
            f"{MOST_MASK_BLUR}, {MASK_BLUR} is usual"
        )
    return asked


def mask_fill(asked: str | None, mask: bool, strength: float) -> str:
    """What a repainted part starts from: one of `MASK_FILLS`. UserError.

    It has no effect without a mask, and at strength 1, where it starts from noise alone.
    """
    if asked is None or asked == MASK_FILLS[0]:
        return MASK_FILLS[0]
    if asked not in MASK_FILLS:
        raise unknown("mask fill", asked, MASK_FILLS)
    if not mask or strength == 1:
        without = "without a mask: give one" if not mask else "at strength 1: set it below"
        raise UserError(f"mask fill {asked!r} has no effect {without}, or leave it out")
    return asked


def size(asked: tuple[int, int] | str, factor: int = FACTOR) -> tuple[int, int]:
    """(width, height) in pixels, each a multiple of `factor`: the VAE's, or 1 for any.

    No larger factor is needed: if the U-Net's downsampling does not divide the latent, diffusers
    passes the sizes on to the upsampling.
    """
    sides = "whole numbers" if factor == 1 else f"multiples of {factor}"
    rule = f"allowed are {sides} from {SMALLEST} to {LARGEST}, such as 512x512"
    if isinstance(asked, str):
        match = re.fullmatch(r"(\d{1,9})\s*[xX*\u00d7]\s*(\d{1,9})", asked.strip(), re.ASCII)
        if match is None:
            shape = re.fullmatch(r"[\d.]+\s*[:/]\s*[\d.]+", asked.strip())
            what = "a shape, and not" if shape else "not"
            raise UserError(f"size {asked!r} is {what} WIDTHxHEIGHT: {rule}")
        asked = (int(match[1]), int(match[2]))
    if len(asked) != 2 or not all(_whole(side) for side in asked):
        raise UserError(f"size {asked!r} is not (width, height) in pixels: {rule}")
    width, height = asked
    if any(side % factor or not SMALLEST <= side <= LARGEST for side in (width, height)):
        raise UserError(f"size {width}x{height}: {rule}")
    return width, height


def is_far(size: tuple[int, int], native: int) -> bool:
    """Whether a model of the native side was not made for such an area."""
    return not 1 / FAR <= size[0] * size[1] / native**2 <= FAR


def size_note(size: tuple[int, int], native: int) -> str | None:
    """A line about a size that the model was not made for; None for others."""
    if not is_far(size, native):
        return None
    return f"the model was made for {native}x{native}, and draws worse at {size[0]}x{size[1]}"


def seed(asked: int | None, images: int) -> int:
    """The first image's seed: the one asked for, or a random one of 32 bits."""
    if asked is None:
        return secrets.randbelow(2**32)
    if not _whole(asked) or not 0 <= asked <= MOST_SEED - (images - 1):
        raise UserError(
            f"seed is {asked!r}: allowed are whole numbers from 0 to 2**63 - {images} "
            f"(picture i of {images} takes seed + i); without a seed it is random"
        )
    return asked


def guidance_rescale(asked: float, guidance: float) -> float:
    """UserError unless it is a share and there is guidance to rescale."""
    if not _number(asked) or not 0 <= asked <= 1:
        raise UserError(
            f"guidance rescale is {asked!r}: allowed are numbers from 0 (none) to 1, 0.7 is usual"
        )
    if asked and guidance <= 1:
        raise UserError(
            f"guidance rescale {asked:g} has no effect at guidance {guidance}: leave it out, or "
            "set guidance above 1"
        )
    return float(asked)


def schedule(config: Mapping[str, Any], spacing: str, steps: int) -> int:
    """The number of noise levels of a scheduler config.

    spacing: a key of `koala.generation.schedule.SPACINGS`. UserError for a schedule that is not
    SDXL's kind (`koala.checkpoints.prediction`), or for more steps than it has noise levels.
    """
    of_config(config)
    levels: int = config["num_train_timesteps"]
    if spacing == "lcm" and not 1 <= steps <= LCM_LEVELS:
        raise UserError(f"{steps} steps: the lcm scheduler takes 1 to {LCM_LEVELS}, 4 is usual")
    if not 1 <= steps <= levels:
        raise UserError(f"{steps} steps: this model takes 1 to {levels}")
    return levels


def steps_done(steps: int, share: float) -> int:
    """How many of the steps a strength of `share` does, rounded down. UserError for 0."""
    done = min(int(steps * share), steps)
    if done < 1:
        raise UserError(
            f"strength {share:g} of {steps} steps leaves no step to do: give a strength of at "
            f"least {1 / steps:.3g}, or more steps"
        )
    return done


def lora_scale(asked: float) -> float:
    """UserError unless a LoRA's scale is in range; negative ones invert its effect."""
    numeric = isinstance(asked, (int, float)) and not isinstance(asked, bool)
    if not numeric or not abs(asked) <= MOST_LORA_SCALE:
        raise UserError(
            f"LoRA scale is {asked!r}: allowed are numbers from -{MOST_LORA_SCALE} to "
            f"{MOST_LORA_SCALE}, 1 is usual"
        )
    return float(asked)


def added_scale(what: str, asked: float | None, most: float, hint: str) -> float:
    """How strong what is added to a model is: 0 to `most`, 1 unless told."""
    if asked is None:
        return 1.0
    if not _number(asked) or not 0 <= asked <= most:
        raise UserError(
            f"{what} scale is {asked!r}: allowed are numbers from 0 (none) to {most}, {hint}"
        )
    return float(asked)


def loras(asked: Sequence[str]) -> dict[str | Path, float]:
    """File -> scale, of each "FILE" or "FILE:SCALE"; the default scale is 1.

    UserError for a scale that is no number or out of range, or a file that is given twice.
    """
    found: dict[str | Path, float] = {}
    for text in asked:
        allowed = f"from -{MOST_LORA_SCALE} to {MOST_LORA_SCALE}"
        file, scale = file_and_scale(text, "LoRA", allowed)
        if file in found:
            raise UserError(f"LoRA {file} is given twice: name each once")
        found[file] = 1.0 if scale is None else lora_scale(scale)
    return found


def ip_adapter(asked: str | None) -> tuple[str | None, float | None]:
    """File and scale of "FILE" or "FILE:SCALE"; None where not given."""
    if asked is None:
        return None, None
    return file_and_scale(asked, "IP-Adapter", f"from 0 to {MOST_IP_SCALE}")


def file_and_scale(text: str, what: str, allowed: str) -> tuple[str, float | None]:
    """The parts of "FILE" or "FILE:SCALE". UserError for a scale that is no number."""
    file, colon, scale = text.rpartition(":")
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", scale, re.ASCII | re.IGNORECASE)
    # "style.safetensors:0,8" is a file and no number; "C:\style.safetensors" is a file.
    meant = Path(file).exists() or "." in Path(file).name or re.match(r"[-+]?\d", scale)
    if not colon or Path(text).exists() or not (number or meant):
        return text, None
    if not number:
        raise UserError(
            f"{what} scale is {scale!r}: allowed are numbers {allowed}, as in {file}:0.8"
        )
    return file, float(scale)


def runtime(
    backend: str | None, compile: bool, graphs: bool, vram: str | float | None = None,
    weights: str | None = None, decode: str | None = None, tiny_vae: str | Path | None = None,
    dtype: str | None = None,
) -> bool:  # fmt: skip
    """Whether a memory plan decides how the model runs: vram, weights, decode or tiny_vae is given.

    UserError for a name that is unknown, and for arguments that exclude each other: backends,
    compiling and CUDA graphs need the whole model on its device. The backend "remembered" is no
    demand: it gives way to the others.
    """
    if backend not in (None, *BACKENDS):
        raise unknown("backend", backend, BACKENDS)
    default_backend()
    if weights not in (None, *WEIGHTS):
        raise unknown("weights", weights, WEIGHTS)
    if decode not in (None, *DECODERS):
        raise unknown("decoder", decode, DECODERS)
    if vram is not None:
        budget(vram)
    demanded = None if backend == "remembered" else backend
    given = {"--backend": demanded, "--compile": compile, "--graphs": graphs, "--dtype": dtype}
    named = [name for name, value in given.items() if value]
    if weights == "int4" and demanded == "openvino":
        raise UserError(
            "--backend openvino takes 4 bits from a folder that is made for it: koala export MODEL "
            "--to openvino --dtype int4 --out FOLDER, and draw with --model FOLDER"
        )
    if planned := any((vram, weights, decode, tiny_vae)):
        for name in named:
            raise UserError(
                f"{name} has no effect under a memory plan: leave it out, or --vram, --weights, "
                "--decode and --tiny-vae"
            )
    if (compile or graphs) and demanded not in (None, "torch"):
        raise UserError(f"{named[1]} is PyTorch's: it does not go with --backend {backend}")
    return planned


def default_backend() -> str | None:
    """$KOALA_BACKEND: the backend of whoever names none; None where it is not set. UserError."""
    named = os.environ.get("KOALA_BACKEND") or None
    if named not in (None, *BACKENDS):
        raise unknown("backend in $KOALA_BACKEND", named, BACKENDS)
    return named


def budget(vram: float | str) -> int | None:
    """Bytes of a budget in GiB; None for "free". UserError for anything else."""
    if vram == "free":
        return None
    try:
        size = float(vram)
    except (TypeError, ValueError):
        size = 0.0
    if isinstance(vram, bool) or not 0 < size < 2**20:
        raise UserError(f"vram is {vram!r}: allowed are numbers of GiB above 0, such as 4, or free")
    return int(size * 2**30)


def _number(value: object) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: object, what: str) -> None:
    """UserError unless `value` is valid text of limited length without control characters."""
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
