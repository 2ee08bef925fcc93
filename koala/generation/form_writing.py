"""Writes the OpenVINO form of a model (`koala.generation.form`), with PyTorch."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from koala.checkpoints.flat import Flat, FlatText, vae_config
from koala.checkpoints.latent_scale import LatentScale
from koala.checkpoints.load import Layer, load_scheduler_config, load_vae, zeros_for_empty
from koala.checkpoints.pipeline_files import SCHEDULER, as_file, pipeline_index, tells_of_model
from koala.errors import UserError
from koala.generation import form
from koala.generation.form import BACKENDS, LAYOUT, MODEL, Form
from koala.generation.pipeline import Pipeline
from koala.generation.quantised_folder import load_any_unet
from koala.generation.runtime import openvino
from koala.generation.runtime.backends import Backend
from koala.generation.runtime.openvino_graph import named
from koala.lora.adapters import Attached
from koala.text_conditioning import TextConditioner
from koala.utils.atomic import new_folder
from koala.utils.extras import require
from koala.utils.networks import AutoencoderKL, UNet2DConditionModel
from koala.utils.quiet import quiet_transformers


def _traced(network: Flat) -> Any:
    """The network as an `openvino.Model` of dynamic shapes."""
    import openvino as ov

    with quiet_transformers(), warnings.catch_warnings():  # every attribute is asked for
        warnings.simplefilter("ignore")  # also deprecated ones
        model = ov.convert_model(network, example_input=network.examples)
    return named(model, network.inputs, network.outputs)


@dataclass(frozen=True)
class Source:
    """A model whose networks are read when they are asked for, each for as long as it is held."""

    name: str
    conditioner: Callable[[], TextConditioner]
    vae: Callable[[], AutoencoderKL]
    unet: Callable[[], UNet2DConditionModel]
    scheduler: dict[str, Any]
    zeros_for_empty: bool

    @classmethod
    def of_folder(cls, folder: Path, name: str, layer: Layer | None = None) -> Source:
        """A checked model folder's; layer: as of `load_any_unet`."""
        return cls(
            name,
            partial(TextConditioner.from_folder, folder),
            partial(load_vae, folder),
            partial(load_any_unet, folder, torch.float32, layer),
            load_scheduler_config(folder),
            zeros_for_empty(folder),
        )

    @classmethod
    def of_pipeline(cls, pipeline: Pipeline) -> Source:
        """UserError for LoRAs beside the weights, where a form does not see them."""
        if any(isinstance(lora, Attached) for lora in pipeline.loras.values()):
            raise UserError(
                "a LoRA lies beside the weights, where a form does not see it: merge it"
            )
        return cls(
            pipeline.name,
            lambda: pipeline.conditioner,
            lambda: pipeline.vae,
            lambda: pipeline.unet,
            pipeline.scheduler_config,
            pipeline.zeros_for_empty,
        )


@torch.inference_mode(False)
@torch.no_grad()
def write_form(
    source: Source,
    backend: str,
    out: Path,
    model: Path | None = None,
    for_genai: bool = False,
    fp16_text: bool = False,
) -> Form:
    """Writes the form of a model, float32 on the CPU, as the folder `out`, whole or not at all.

    One network after the other, so that no more of them need be in memory. backend: "openvino" or
    "openvino-bf16". What was converted before comes from the cache. model: the folder whose credits
    go along. for_genai: also what only OpenVINO GenAI needs, by the package openvino-tokenizers.
    fp16_text: stores the text encoders' weights in fp16. UserError for another backend, and for a
    folder that exists.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} has no form: allowed are {', '.join(BACKENDS)}")
    require("an OpenVINO form", "openvino", "openvino")
    precision = "bf16" if backend == "openvino-bf16" else "fp32"
    index = pipeline_index() | {"force_zeros_for_empty_prompt": source.zeros_for_empty}
    with new_folder(out) as part:
        facts = {
            **_write_text(source.conditioner(), part, for_genai, fp16_text),
            **_write_decoder(source.vae(), part, precision),
            **_write_unet(source.unet(), part, precision),
        }
        facts["native"] *= facts["factor"]
        _write(part / "model_index.json", index)
        _write(part / SCHEDULER, source.scheduler)
        for file in model.iterdir() if model else ():
            if tells_of_model(file.name):
                shutil.copyfile(file, part / file.name)
        described = Form(
            layout=LAYOUT, name=source.name, backend=backend, scheduler=source.scheduler,
            zeros_for_empty=source.zeros_for_empty, **facts,
        )  # fmt: skip
        described.write(part)
    return described


def _write(file: Path, config: Mapping[str, Any]) -> None:
    """A small file that OpenVINO GenAI reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(as_file(config))


def _write_text(
    conditioner: TextConditioner, part: Path, for_genai: bool, half: bool
) -> dict[str, Any]:
    """Text encoders and tokenizers; returns what a `Form` says of them."""
    tokenizers = conditioner.tokenizers
    for n, encoder in zip(("", "_2"), conditioner.encoders, strict=True):
        _write(part / f"text_encoder{n}/config.json", encoder.config.to_diff_dict())
        flat = FlatText(encoder, projected=n == "_2").eval()
        openvino.save_model(_traced(flat), part / f"text_encoder{n}" / MODEL, half)
    for n, tokenizer in zip(("", "_2"), tokenizers, strict=True):
        file = form.tokenizer_file(part, n)
        file.parent.mkdir()
        file.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        if for_genai:
            _convert_tokenizer(tokenizer, file.parent)
    special = tuple((one.bos_token_id, one.eos_token_id, one.pad_token_id) for one in tokenizers)
    return {"tokens": conditioner.tokens, "special": special, "widths": conditioner.widths}


def _write_decoder(vae: AutoencoderKL, part: Path, precision: str) -> dict[str, Any]:
    """The VAE's decoder; returns what a `Form` says of it."""
    _write(part / "vae_decoder/config.json", vae_config(openvino.settings_of(vae)))
    _linked(openvino.decoder_engine(vae, precision).file, part / "vae_decoder" / MODEL)
    factor = int(2 ** (len(vae.config.block_out_channels) - 1))
    return {"factor": factor, "latent_factor": LatentScale(vae.config).factor}


def _write_unet(unet: UNet2DConditionModel, part: Path, precision: str) -> dict[str, Any]:
    """The U-Net; returns what a `Form` says of it, `native` as latents have it."""
    _write(part / "unet/config.json", openvino.settings_of(unet))
    _linked(openvino.unet_engine(unet, precision).file, part / "unet" / MODEL)
    return {"channels": int(unet.config.in_channels), "native": int(unet.config.sample_size)}


def _convert_tokenizer(tokenizer: Any, folder: Path) -> None:
    from openvino_tokenizers import convert_tokenizer

    model = convert_tokenizer(tokenizer, with_detokenizer=False)
    openvino.save_model(model, folder / "openvino_tokenizer.xml")


def keep_form(pipeline: Pipeline, folder: Path, chosen: Backend) -> None:
    """Keeps in the cache what the next start needs to draw as this pipeline does, without PyTorch.

    That is its form, if OpenVINO runs it, and the verdict, if a measurement chose it.
    """
    if pipeline.loras or pipeline.unet.dtype != torch.float32:
        return  # not the folder's own weights
    if chosen.name in form.BACKENDS:
        place = form.place_of(folder, chosen.name)
        if not form.is_form(place):
            write_form(Source.of_pipeline(pipeline), chosen.name, place)
    if chosen.by_verdict:
        form.remember(folder, chosen.name)


def _linked(file: Path, to: Path) -> None:
    """Gives a network's xml and bin a second name."""
    for ending in (".xml", ".bin"):
        _copied(file.with_suffix(ending), to.with_suffix(ending))


def _copied(file: Path, to: Path) -> None:
    """A second name of the file where the disk allows it, else a copy."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
