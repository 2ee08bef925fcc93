"""The OpenVINO form of a model: a folder that draws without PyTorch. Importing this loads no torch.

    form.json                       what the model is (`Form`)
    unet/openvino_model.xml, .bin   and so on for vae_decoder, text_encoder, text_encoder_2
    tokenizer/tokenizer.json        and tokenizer_2/, for the package tokenizers

It is the layout that optimum writes, so OpenVINO GenAI opens it too, by the configs beside the
networks and openvino_tokenizer.xml beside the tokenizers.

`koala export MODEL --to openvino` writes one. A model that was drawn with OpenVINO once has one in
the cache, under a name made of its files' sizes and times: other weights never draw from it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from koala.checkpoints.validate import CONFIGS, read_json
from koala.errors import UserError
from koala.utils.asset_packages import cache_folder
from koala.utils.atomic import write_text
from koala.utils.device import cpu_name
from koala.utils.digest import digest

FORM = "form.json"
NETWORKS = ("unet", "vae_decoder", "text_encoder", "text_encoder_2")
MODEL = "openvino_model.xml"  # of a network
LAYOUT = 2  # of the folder; another number is another layout
BACKENDS = ("openvino", "openvino-bf16")  # that have a form
# int4: a U-Net's weights in 4 bits, which are float32 where they are used.
OF_DTYPE = {"fp32": "openvino", "bf16": "openvino-bf16", "int4": "openvino"}
REMEMBERED = ("auto", "remembered")  # what an earlier drawing found serves them


@dataclass(frozen=True)
class Form:
    """What a form's networks do not say themselves."""

    layout: int
    name: str
    backend: str  # of BACKENDS
    native: int  # pixels of a side
    channels: int  # of a latent
    factor: int  # pixels per latent position, along a side
    tokens: int  # that the text encoders read at a time
    special: tuple[tuple[int, int, int], ...]  # of each tokenizer: start, end, padding
    widths: tuple[int, int]  # of the text encoders' embeddings
    latent_factor: float  # what the decoder takes are the U-Net's latents / latent_factor
    scheduler: dict[str, Any]
    zeros_for_empty: bool

    @classmethod
    def read(cls, folder: Path) -> Form:
        """UserError for a folder that is not whole, or of another layout."""
        values = read_json(folder / FORM)
        names = {field.name for field in fields(cls)}
        if values.get("layout") != LAYOUT or {*values} != names:
            raise UserError(
                f"{folder / FORM} is of another version of koala: write it again with koala "
                "export MODEL --to openvino"
            )
        needed = [network_file(folder, name) for name in NETWORKS]
        needed += [file.with_suffix(".bin") for file in needed]
        needed += [tokenizer_file(folder, n) for n in ("", "_2")]
        for file in needed:
            if not file.is_file():
                lacking = file.relative_to(folder)
                raise UserError(f"{folder} lacks {lacking}: write it again, or copy all of it")
        values["special"] = tuple(tuple(three) for three in values["special"])
        values["widths"] = tuple(values["widths"])
        return cls(**values)

    def write(self, folder: Path) -> None:
        (folder / FORM).write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")


def network_file(folder: Path, name: str) -> Path:
    """The xml of one of NETWORKS."""
    return folder / name / MODEL


def tokenizer_file(folder: Path, n: str) -> Path:
    """The tokenizer's JSON; n: "" for the first, "_2" for the second."""
    return folder / f"tokenizer{n}" / "tokenizer.json"


def is_form(model: str | Path) -> bool:
    """Whether a model's name is the folder of a form."""
    return (Path(model).expanduser() / FORM).is_file()


def place_of(folder: Path, backend: str) -> Path:
    """Where the cache keeps the form of a model folder, or would."""
    return cache_folder() / "forms" / digest([*_key(folder), backend])


def found(folder: Path, backend: str) -> Path | None:
    """The form in the cache that a backend draws a model folder from; None if there is none."""
    if backend in REMEMBERED:
        file = _choice(folder)
        backend = file.read_text("utf-8").strip() if file.is_file() else ""
    place = place_of(folder, backend)
    return place if backend in BACKENDS and is_form(place) else None


def remember(folder: Path, backend: str) -> None:
    """Keeps which backend a measurement has chosen for a model folder on this machine."""
    write_text(_choice(folder), backend + "\n")


def _choice(folder: Path) -> Path:
    return place_of(folder, json.dumps(["chosen", *_machine()])).with_suffix(".txt")


def _machine() -> list[Any]:
    """What a measurement depends on besides the model, as far as it is known without PyTorch."""
    return [cpu_name(), os.cpu_count(), os.environ.get("OMP_NUM_THREADS"), _version("torch")]


def _key(folder: Path) -> list[Any]:
    """All that a form depends on."""
    parts = [folder / "model_index.json", *(folder / part for part in sorted(CONFIGS))]
    files = [file for part in parts for file in ([part] if part.is_file() else part.rglob("*"))]
    states = [(file, file.stat()) for file in sorted(files) if file.is_file()]
    return [
        LAYOUT, _version("openvino"), str(folder.resolve()),
        [(str(file.relative_to(folder)), s.st_size, s.st_mtime_ns) for file, s in states],
    ]  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
