"""Training runs of the mini family's VAE, text encoders and tiny autoencoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.checkpoints.load import load_vae
from koala.checkpoints.pipeline_files import BETAS, as_file, pipeline_index
from koala.checkpoints.resolve import resolve_model
from koala.data.encoding import to_pixels
from koala.data.illustrations.images import NOTICE, ImageSet
from koala.data.latents import LatentSet
from koala.distillation.loop import train
from koala.distillation.parallel import alone
from koala.errors import UserError
from koala.generation.decode import TINY
from koala.mini.sentence_encoder import SentenceEncoder
from koala.mini.settings import Autoencoder, Base, Tiny
from koala.mini.text import (
    TextData,
    TextDistillation,
    clip_tokenizer,
    new_text_encoders,
    start_from_words,
    vocabulary_words,
)
from koala.mini.tiny import TinyDistillation, new_tiny
from koala.mini.vae import SHOWN, Autoencoding, ImageData, measure_latents, new_vae
from koala.utils.atomic import new_folder


def run_base(recipe: Base, data: Path, out: Path, device: str, loggers: Sequence[str]) -> Path:
    """Trains VAE and text encoders; writes a pipeline folder with them and an untrained U-Net."""
    images = ImageSet(data)
    seen = images.select("train")
    torch.manual_seed(recipe.vae.seed)
    vae = new_vae(images.image(0).width).to(device, memory_format=torch.channels_last)
    vae_task = Autoencoding(vae, _shown(images))
    painted = _painted(images, recipe.kinds, recipe.vae.seed)
    note = {"recipe": asdict(recipe)}
    train(vae_task, painted, recipe.vae, out / "vae", note, loggers=loggers)
    measure_latents(vae, _sample(painted).to(device))
    vae_task = vae_task.sharpening()
    train(vae_task, painted, recipe.decoder, out / "decoder", note, loggers=loggers)

    torch.manual_seed(recipe.text.seed)
    tokenizer = clip_tokenizer()
    encoders = new_text_encoders(tokenizer).to(device)
    sentences = SentenceEncoder(device)
    start_from_words(encoders, tokenizer, sentences)
    text_task = TextDistillation(encoders, tokenizer, sentences).to(device)
    captions = sorted({images.rows[i][c] for i in seen for c in ("short", "long", "subject")})
    texts = TextData(captions, vocabulary_words(tokenizer), recipe.text.seed)
    train(text_task, texts, recipe.text, out / "text", note, loggers=loggers)
    return assemble(out / "model", vae_task, text_task, data)


def run_autoencoder(
    recipe: Autoencoder,
    data: str | Path,
    out: Path,
    teacher: str,
    device: str,
    loggers: Sequence[str],
) -> Path:
    """Trains the VAE further and writes the teacher's folder with it; the card is the teacher's.

    This changes the latents: prepared folders have to be prepared again.
    """
    layout = alone(device, recipe.cpu_bf16)
    source, images = resolve_model(teacher), ImageSet(data)
    painted = _painted(images, recipe.kinds, recipe.training.seed)
    vae = load_vae(source).to(device, memory_format=torch.channels_last)
    task = Autoencoding(
        vae,
        _shown(images),
        recipe.perceptual,
        colour=recipe.colour,
        cropped=0.0,
        drift=recipe.drift,
    )
    note = {"recipe": asdict(recipe)}
    trained = train(task, painted, recipe.training, out, note, layout=layout, loggers=loggers)
    assert isinstance(trained, AutoencoderKL)
    measure_latents(trained, _sample(painted).to(device))
    return _with_part(source, "vae", lambda folder: task.export(trained, folder), out / "model")


def _painted(images: ImageSet, kinds: dict[str, int], seed: int) -> ImageData:
    """The training images, with copies of each kind in an epoch; UserError if there are none."""
    epoch = [i for kind, n in kinds.items() for i in images.select("train", kind) * n]
    if not epoch:
        raise UserError(
            f"{images.folder} has no training images for an epoch of {kinds}: raise a number, "
            "or prepare images of these kinds"
        )
    return ImageData(images, epoch, seed)


def _sample(painted: ImageData) -> Tensor:
    """At most a thousand of the images."""
    return painted.every(len(painted.pixels) // 1000 + 1)


def _shown(images: ImageSet) -> Tensor:
    """Held-out images for previews."""
    return to_pixels([images.image(i) for i in images.select("test-pair")[:SHOWN]])


def run_tiny(
    recipe: Tiny, data: str | Path, out: Path, teacher: str, device: str, loggers: Sequence[str]
) -> Path:
    """Trains the tiny autoencoder and writes the teacher's folder with it and the same card."""
    layout = alone(device, recipe.cpu_bf16)
    source, seed = resolve_model(teacher), recipe.training.seed
    latents = LatentSet(data, source, recipe.kinds, {"short": 1.0}, seed)
    torch.manual_seed(seed)
    task = TinyDistillation(
        new_tiny().to(device, memory_format=torch.channels_last),
        load_vae(source).to(device),
        shown=latents.batch(0, 16)["latents"],
    )
    note = {"recipe": asdict(recipe)}
    trained = train(task, latents, recipe.training, out, note, layout=layout, loggers=loggers)
    return _with_part(source, TINY, lambda folder: task.export(trained, folder), out / "model")


def _with_part(source: Path, name: str, export: Callable[[Path], None], model: Path) -> Path:
    """Writes the pipeline folder `model`: `source` with the component `name` exported anew."""
    with new_folder(model, replace=True) as part:
        shutil.copytree(source, part, ignore=shutil.ignore_patterns(name), dirs_exist_ok=True)
        export(part / name)
    return model


def assemble(model: Path, vae_task: Autoencoding, text_task: TextDistillation, data: Path) -> Path:
    """Writes the pipeline folder with an untrained `sdxl-mini` U-Net; replaces an older one."""
    with new_folder(model, replace=True) as part:
        vae_task.export(vae_task.trainable, part / "vae")
        text_task.export(text_task.trainable, part)
        UNet2DConditionModel(**unet_config(get("sdxl-mini"))).save_pretrained(part / "unet")
        EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing").save_pretrained(
            part / "scheduler"
        )
        (part / "model_index.json").write_bytes(as_file(pipeline_index()))
        shutil.copy(data / NOTICE, part)
    return model
