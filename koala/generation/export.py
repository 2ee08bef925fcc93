"""Writes the OpenVINO form of a model (`koala.generation.form`), with PyTorch."""

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koala.checkpoints.latent_scale import LatentScale
from koala.errors import UserError
from koala.generation import form
from koala.generation.form import BACKENDS, LAYOUT, OF_DTYPE, Form, check_export
from koala.generation.pipeline import Pipeline
from koala.generation.runtime import openvino
from koala.generation.runtime.backends import Backend
from koala.lora.adapters import Attached
from koala.utils.atomic import new_folder
from koala.utils.extras import require


class _FlatEncoder(nn.Module):
    """A text encoder: token ids to the penultimate hidden states, and the pooled output if any."""

    def __init__(self, encoder: Any, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.pooled = encoder, pooled

    def forward(self, ids: Tensor) -> Any:
        output = self.encoder(ids, output_hidden_states=True)
        hidden = output.hidden_states[-2]
        return (hidden, output.text_embeds) if self.pooled else hidden


def _traced(module: nn.Module, example: Tensor) -> Any:
    """The module as an `openvino.Model` of dynamic shapes."""
    import openvino
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the conversion asks for every attribute, also deprecated ones
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return openvino.convert_model(module, example_input=(example,))
    finally:
        logging.set_verbosity(level)


@torch.inference_mode(False)
@torch.no_grad()
def write_form(pipeline: Pipeline, backend: str, out: Path) -> Form:
    """Writes the form of a pipeline, float32 on the CPU, as the folder `out`, whole or not at all.

    backend: "openvino" or "openvino-bf16". What was converted before comes from the cache.
    UserError for another backend, for LoRAs beside the weights, and for a folder that exists.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} has no form: allowed are {', '.join(BACKENDS)}")
    require("an OpenVINO form", "openvino", "openvino")
    if any(isinstance(lora, Attached) for lora in pipeline.loras.values()):
        raise UserError("a LoRA lies beside the weights, where a form does not see it: merge it")
    half = backend == "openvino-bf16"
    networks = {
        "unet": openvino.unet_engine(pipeline.unet, "bf16" if half else "fp32").file,
        "decoder": openvino.decoder_engine(pipeline.vae, "bf16" if half else "fp32").file,
    }
    with new_folder(out) as part:
        for name, file in networks.items():
            for ending in (".xml", ".bin"):
                _copied(file.with_suffix(ending), part / f"{name}{ending}")
        for n, encoder in zip(("", "_2"), pipeline.conditioner.encoders, strict=True):
            example = torch.zeros(1, pipeline.conditioner.tokens, dtype=torch.long)
            flat = _FlatEncoder(encoder, pooled=n == "_2").eval()
            openvino.save_model(_traced(flat, example), part / f"text_encoder{n}.xml")
        for n, tokenizer in zip(("", "_2"), pipeline.conditioner.tokenizers, strict=True):
            content = tokenizer.backend_tokenizer.to_str()
            (part / f"tokenizer{n}.json").write_text(content, encoding="utf-8")
        described = _described(pipeline, backend)
        described.write(part)
    return described


def keep_form(pipeline: Pipeline, folder: Path, chosen: Backend) -> None:
    """Keeps in the cache what the next start needs to draw as this pipeline does, without PyTorch.

    That is its form, if OpenVINO runs it, and the verdict, if a measurement chose it.
    """
    if pipeline.loras or pipeline.unet.dtype != torch.float32:
        return  # not the folder's own weights
    if chosen.name in form.BACKENDS:
        place = form.place_of(folder, chosen.name)
        if not form.is_form(place):
            write_form(pipeline, chosen.name, place)
    if chosen.by_verdict:
        form.remember(folder, chosen.name)


def _described(pipeline: Pipeline, backend: str) -> Form:
    conditioner, scale = pipeline.conditioner, LatentScale(pipeline.vae.config)
    return Form(
        layout=LAYOUT,
        name=pipeline.name,
        backend=backend,
        native=pipeline.known.native,
        channels=pipeline.channels,
        factor=pipeline.factor,
        tokens=conditioner.tokens,
        special=tuple(
            (one.bos_token_id, one.eos_token_id, one.pad_token_id) for one in conditioner.tokenizers
        ),
        widths=conditioner.widths,
        latent_factor=scale.factor,
        latent_mean=tuple(scale.mean.flatten().tolist()),
        latent_std=tuple(scale.std.flatten().tolist()),
        scheduler=pipeline.scheduler_config,
        zeros_for_empty=pipeline.zeros_for_empty,
    )


def _copied(file: Path, to: Path) -> None:
    """A second name of the file where the disk allows it, else a copy."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


@dataclass(frozen=True)
class FormReport:
    """What `export` did."""

    model: str
    backend: str
    bytes: int  # of the folder
    out: Path

    def line(self) -> str:
        """One line for the terminal."""
        return f"{self.model} for {self.backend}, {self.bytes / 1e6:,.1f} MB in {self.out}"


def export(pipeline: Pipeline, out: Path, dtype: str | None = None) -> FormReport:
    """Writes a model's OpenVINO form as the folder `out`, which draws without PyTorch.

    dtype: "fp32", or "bf16" for a processor that computes in it; by default fp32. UserError
    for another dtype, for a package that is missing and if `out` exists.
    """
    check_export(out, dtype)
    backend = OF_DTYPE[dtype]
    write_form(pipeline, backend, out)
    size = sum(file.stat().st_size for file in out.iterdir())
    return FormReport(pipeline.name, backend, size, out)
