"""Writes the OpenVINO form of a model (`koala.generation.form`), with PyTorch."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from koala.checkpoints.flat import Flat, FlatText, vae_config
from koala.checkpoints.latent_scale import LatentScale
from koala.checkpoints.pipeline_files import SCHEDULER, as_file, is_credit, pipeline_index
from koala.errors import UserError
from koala.generation import form
from koala.generation.form import BACKENDS, LAYOUT, MODEL, Form
from koala.generation.pipeline import Pipeline
from koala.generation.runtime import openvino
from koala.generation.runtime.backends import Backend
from koala.generation.runtime.openvino_graph import named
from koala.lora.adapters import Attached
from koala.utils.atomic import new_folder
from koala.utils.extras import require


def _traced(network: Flat) -> Any:
    """The network as an `openvino.Model` of dynamic shapes."""
    import openvino as ov
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the conversion asks for every attribute, also deprecated ones
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ov.convert_model(network, example_input=network.examples)
    finally:
        logging.set_verbosity(level)
    return named(model, network.inputs, network.outputs)


@torch.inference_mode(False)
@torch.no_grad()
def write_form(
    pipeline: Pipeline, backend: str, out: Path, model: Path | None = None, for_genai: bool = False
) -> Form:
    """Writes the form of a pipeline, float32 on the CPU, as the folder `out`, whole or not at all.

    backend: "openvino" or "openvino-bf16". What was converted before comes from the cache. model:
    the folder whose credits go along. for_genai: also what only OpenVINO GenAI needs, by the
    package openvino-tokenizers. UserError for another backend, for LoRAs beside the weights, and
    for a folder that exists.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} has no form: allowed are {', '.join(BACKENDS)}")
    require("an OpenVINO form", "openvino", "openvino")
    if any(isinstance(lora, Attached) for lora in pipeline.loras.values()):
        raise UserError("a LoRA lies beside the weights, where a form does not see it: merge it")
    precision = "bf16" if backend == "openvino-bf16" else "fp32"
    networks = {
        "unet": openvino.unet_engine(pipeline.unet, precision).file,
        "vae_decoder": openvino.decoder_engine(pipeline.vae, precision).file,
    }
    conditioner = pipeline.conditioner
    with new_folder(out) as part:
        for path, content in _configs(pipeline).items():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            (part / path).write_bytes(content)
        for name, file in networks.items():
            for ending in (".xml", ".bin"):
                _copied(file.with_suffix(ending), (part / name / MODEL).with_suffix(ending))
        for n, encoder in zip(("", "_2"), conditioner.encoders, strict=True):
            flat = FlatText(encoder, projected=n == "_2").eval()
            openvino.save_model(_traced(flat), part / f"text_encoder{n}" / MODEL)
        for n, tokenizer in zip(("", "_2"), conditioner.tokenizers, strict=True):
            folder = part / f"tokenizer{n}"
            folder.mkdir()
            spelled = tokenizer.backend_tokenizer.to_str()
            (folder / "tokenizer.json").write_text(spelled, encoding="utf-8")
            if for_genai:
                _convert_tokenizer(tokenizer, folder)
        for file in model.iterdir() if model else ():
            if is_credit(file.name):
                shutil.copyfile(file, part / file.name)
        described = _described(pipeline, backend)
        described.write(part)
    return described


def _configs(pipeline: Pipeline) -> dict[str, bytes]:
    """The small files that OpenVINO GenAI reads, by their paths."""
    index = pipeline_index() | {"force_zeros_for_empty_prompt": pipeline.zeros_for_empty}
    encoders = zip(("", "_2"), pipeline.conditioner.encoders, strict=True)
    configs = {
        "model_index.json": index,
        SCHEDULER: pipeline.scheduler_config,
        "unet/config.json": openvino.settings_of(pipeline.unet),
        "vae_decoder/config.json": vae_config(openvino.settings_of(pipeline.vae)),
        **{f"text_encoder{n}/config.json": one.config.to_diff_dict() for n, one in encoders},
    }
    return {path: as_file(config) for path, config in configs.items()}


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
            write_form(pipeline, chosen.name, place)
    if chosen.by_verdict:
        form.remember(folder, chosen.name)


def _described(pipeline: Pipeline, backend: str) -> Form:
    conditioner = pipeline.conditioner
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
        latent_factor=LatentScale(pipeline.vae.config).factor,
        scheduler=pipeline.scheduler_config,
        zeros_for_empty=pipeline.zeros_for_empty,
    )


def _copied(file: Path, to: Path) -> None:
    """A second name of the file where the disk allows it, else a copy."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
