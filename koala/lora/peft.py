"""PEFT's settings of a LoRA: reads them, derives alpha from them, and rewrites them.

PEFT does not store alpha with the weights. diffusers writes the settings to the file's metadata,
PEFT itself to an `adapter_config.json` beside `adapter_model.safetensors`. Without either, alpha
is the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala.checkpoints.tensors import read_metadata
from koala.checkpoints.validate import read_json, some
from koala.errors import UserError
from koala.lora.names import PARTS, Target

METADATA_KEY = "lora_adapter_metadata"  # diffusers' name
TYPES = ("LORA", "LOHA", "LOKR")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names


@dataclass(frozen=True)
class PeftSettings:
    """PEFT's config of each part of the pipeline that has one."""

    parts: dict[str, dict[str, Any]]
    prefixed: bool = True  # names in the metadata start with the part: "unet.r"
    beside: bool = False  # in a separate file

    def factor(self, target: Target, rank: int | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) if rank-stabilised.

        rank: None for a LoKr of whole matrices, which PEFT divides by the rank it was asked for.
        """
        config = self.parts.get(target.part, {})
        if rank is None:
            ranks = config.get("rank_pattern") or {}
            own = (value for name, value in ranks.items() if _names(name, target))
            rank = next(own, config.get("r"))
        if rank is None:
            return 1.0
        patterns = config.get("alpha_pattern") or {}
        found = (alpha for name, alpha in patterns.items() if _names(name, target))
        alpha = next(found, config.get("lora_alpha", config.get("alpha", rank)))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def decomposed(self, target: Target) -> bool:
        """Whether the adapter of a module is a DoRA."""
        return bool(self.parts.get(target.part, {}).get("use_dora"))

    def check(self, file: Path, targets: Collection[Target]) -> None:
        """Raises `UserError` for unsupported settings."""
        for part, config in self.parts.items():
            if (kind := config.get("peft_type", "LORA")) not in TYPES:
                raise UserError(
                    f"{file} is a PEFT adapter of type {kind}; it must be one of {', '.join(TYPES)}"
                )
            patterns = config.get("alpha_pattern") or {}
            if not isinstance(patterns, dict):
                raise UserError(f"{file}: PEFT's alpha_pattern must be an object")
            for value in (config.get("lora_alpha", config.get("alpha", 1)), *patterns.values()):
                if not isinstance(value, (int, float)) or isinstance(value, bool):
                    raise UserError(f"{file}: PEFT's lora_alpha is {value!r}; it must be a number")
            own = [target for target in targets if target.part == part]
            if strange := [p for p in patterns if not any(_names(p, target) for target in own)]:
                raise UserError(f"{file}: PEFT's alpha_pattern matches no module: {some(strange)}")

    def moved(self, adapters: Mapping[str, tuple[int | None, float]]) -> PeftSettings:
        """The same settings for the U-Net modules `adapters`: path -> (rank, factor).

        Rules that select modules are replaced by the list of these modules.
        """
        if "unet" not in self.parts:
            return self
        config = self.parts["unet"]
        alphas = {
            path: factor * (math.sqrt(rank) if config.get("use_rslora") else rank)
            for path, (rank, factor) in adapters.items()
            if rank is not None
        }
        ranks = {path: rank for path, (rank, _) in adapters.items() if rank is not None}
        unet = {
            **config,
            "target_modules": sorted(adapters),
            "rank_pattern": {p: rank for p, rank in ranks.items() if rank != config.get("r")},
            "alpha_pattern": {
                p: a
                for p, a in alphas.items()
                if a != config.get("lora_alpha", config.get("alpha"))
            },
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        return PeftSettings({**self.parts, "unet": unet}, self.prefixed, self.beside)

    def text(self) -> str:
        """The settings as JSON, in the form in which they were read."""
        if self.beside or not self.prefixed:
            return json.dumps(self.parts["unet"], indent=2, sort_keys=True)
        flat = {f"{part}.{k}": v for part, config in self.parts.items() for k, v in config.items()}
        return json.dumps(flat, indent=2, sort_keys=True)


def read_settings(file: Path) -> PeftSettings:
    """PEFT's settings of a LoRA file; empty if it has none. Raises `UserError`."""
    text = read_metadata(file).get(METADATA_KEY)
    if text is None:
        beside = file.with_name(CONFIG)
        if file.name == WEIGHTS and beside.is_file():
            return PeftSettings({"unet": read_json(beside)}, beside=True)
        return PeftSettings({})
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its {METADATA_KEY} is not valid JSON ({error})") from None
    if not isinstance(flat, dict):
        raise UserError(f"{file}: its {METADATA_KEY} must be a JSON object")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        part, _, setting = name.partition(".")
        if part in PARTS and setting:
            parts.setdefault(part, {})[setting] = value
    return PeftSettings(parts) if parts else PeftSettings({"unet": flat}, prefixed=False)


def _names(name: str, target: Target) -> bool:
    """Whether a name in PEFT's settings, a full path or a suffix, matches the module."""
    return target.path == name or target.path.endswith(f".{name}")
