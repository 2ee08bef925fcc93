"""The metadata by which other programs show a single file: the ModelSpec standard's keys.

Source: Stability AI's ModelSpec 1.0.0, which A1111, ComfyUI, kohya's scripts and SwarmUI read.
"""

from __future__ import annotations

from koala.architectures.table import FACTOR
from koala.checkpoints import model_card
from koala.checkpoints.pipeline_files import Contents

_SDXL = "stable-diffusion-xl-v1-base"  # its identifier of SDXL; KOALA's U-Nets have none


def of_contents(contents: Contents) -> dict[str, str]:
    """The entries for a model's single file.

    What the model's own metadata says stays, but for what it predicts, which the scheduler says.
    """
    card = model_card.of_contents(contents.source, contents.metadata)
    arch, side = contents.architecture, contents.architecture.sample * FACTOR
    licence = card.licence.name or card.licence.identifier
    known = {
        "sai_model_spec": "1.0.0",
        "architecture": _SDXL if arch.name == "sdxl" else arch.name,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": card.title,
        "resolution": f"{side}x{side}",
        "license": "" if licence == "unknown" else licence,
        "merged_from": ", ".join(card.assembled.loras) if card.assembled else "",
    }
    stated = {f"modelspec.{key}": value for key, value in known.items() if value}
    return {**stated, **contents.metadata, **contents.prediction.metadata}
