"""Reads the metrics' weights: folders in transformers' format, and pickled tensors, never code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from koala.errors import UserError

T = TypeVar("T")


def pretrained(kind: type[T], folder: Path, **options: Any) -> T:
    """A class of transformers, read from a folder. UserError if it does not fit.

    Weights are read from safetensors alone, and never from the network.
    """
    weights = {"use_safetensors": True} if hasattr(kind, "config_class") else {}
    try:
        found = kind.from_pretrained(folder, local_files_only=True, **weights, **options)  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} does not hold a {kind.__name__}: {reason[:200]}") from None
    return found


def read_pickled(file: Path, under: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .pt or .pth file, or of a .safetensors file of the same.

    under: the key whose value holds them, where there is one. UserError for a file that holds
    more than tensors, or that is damaged.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} cannot be read as tensors alone: {reason[:200]}") from None
    if under is not None and isinstance(found, dict) and isinstance(found.get(under), dict):
        found = found[under]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{file} holds no named tensors: give the file that its authors publish")
    return found
