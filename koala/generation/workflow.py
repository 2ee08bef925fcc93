"""The settings of an image as a ComfyUI workflow that draws the same one there.

It is the API format, which ComfyUI loads from a file or from a PNG that is dropped on it: nodes by
number, each input a value or [node, output]. What it cannot say is refused. Loads no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from koala.errors import UserError
from koala.generation.prompt_editing import by_step
from koala.generation.prompt_syntax import parse
from koala.generation.requests import Settings
from koala.generation.samplers import LABELS

_SAMPLERS = {  # A1111's names, as in `Settings` -> ComfyUI's
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ SDE": "dpmpp_sde",
    "DDIM": "ddim",
}
_SCHEDULES = {  # our spacings -> its schedulers of the same noise levels
    "trailing": "sgm_uniform",
    "uniform": "normal",
    "karras": "karras",
    "exponential": "exponential",
}
_SEEDS = 2**64

Workflow = dict[str, dict[str, Any]]


def workflow(settings: Settings, checkpoint: str | None = None) -> Workflow:
    """The nodes that draw an image of these settings from noise.

    checkpoint: the single file in ComfyUI's folder of checkpoints; by default named after the
    model. Raises `UserError` for an image that starts from another, for guidance that ends early,
    which needs other nodes, for samplers and noise levels that are not the same there, and for
    prompts that it has no words for.
    """
    if settings.image or settings.guidance_until < 1:
        raise UserError(
            "a ComfyUI workflow is made for images from noise, with guidance to the end: leave out "
            "--image and --guidance-until"
        )
    spacing = LABELS[settings.schedule]
    if settings.sampler not in _SAMPLERS or settings.schedule not in _SCHEDULES:
        raise UserError(
            f"ComfyUI has not the sampler {settings.sampler} with {spacing} steps: leave out "
            f"--workflow, or choose {', '.join(_SAMPLERS)}, as it is or with "
            f"{', '.join(f'-{name}' for name in _SCHEDULES)}"
        )
    beside = {
        "a ControlNet": settings.control,
        "an IP-Adapter": settings.ip_adapter,
        "textual inversions": settings.embeddings,
    }
    for what, given in beside.items():
        if given:
            raise UserError(
                f"a ComfyUI workflow is made for images without {what}: leave out --workflow"
            )
    texts = [_in_its_syntax(t, settings.steps) for t in (settings.prompt, settings.negative_prompt)]
    nodes: Workflow = {}

    def add(kind: str, **inputs: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return str(len(nodes))

    name = checkpoint or f"{Path(settings.model).name.removesuffix('.safetensors')}.safetensors"
    loaded = add("CheckpointLoaderSimple", ckpt_name=name)
    model, clip, vae = [loaded, 0], [loaded, 1], [loaded, 2]
    for lora, scale in settings.loras:
        node = add(
            "LoraLoader", model=model, clip=clip, lora_name=f"{lora}.safetensors",
            strength_model=scale, strength_clip=scale,
        )  # fmt: skip
        model, clip = [node, 0], [node, 1]
    if settings.guidance_rescale:
        model = [add("RescaleCFG", model=model, multiplier=settings.guidance_rescale), 0]
    positive, negative = ([add("CLIPTextEncode", clip=clip, text=text), 0] for text in texts)
    if not settings.negative_prompt:  # the U-Net was trained with zeros, not with the text ""
        negative = [add("ConditioningZeroOut", conditioning=negative), 0]
    latent = add(
        "EmptyLatentImage", width=settings.width, height=settings.height, batch_size=1
    )  # fmt: skip
    sampled = add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=[latent, 0],
        seed=settings.seed % _SEEDS, steps=settings.steps, cfg=max(1.0, settings.guidance),
        sampler_name=_SAMPLERS[settings.sampler], scheduler=_SCHEDULES[settings.schedule],
        denoise=1.0,
    )  # fmt: skip
    decoded = add("VAEDecode", samples=[sampled, 0], vae=vae)
    add("SaveImage", images=[decoded, 0], filename_prefix="koala")
    return nodes


def _in_its_syntax(prompt: str, steps: int) -> str:
    """A prompt for ComfyUI: weights stand in round brackets there, and square ones are words."""
    always, *others = dict.fromkeys(by_step(prompt, steps))
    text, *more = parse(always)
    for what, given in (("changes over the steps", others), ("BREAK", more)):
        if given:
            raise UserError(
                f"ComfyUI's prompts have no {what}: leave out --workflow, or write without"
            )
    escaped = [(re.sub(r"([()])", r"\\\1", each.text), each.weight) for each in text]
    return "".join(t if weight == 1 else f"({t}:{weight:.4g})" for t, weight in escaped)


def as_text(nodes: Workflow) -> str:
    """The workflow as a file's content."""
    return json.dumps(nodes, indent=1, ensure_ascii=False) + "\n"
