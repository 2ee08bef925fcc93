"""What running a recipe means: build task and data from its configuration, train, export.

Every run leaves its finished pipeline folder in `<out>/model`; run again, it goes on where it was.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from koala import architectures, card, recipes
from koala.compression import compress
from koala.conditioning import TextConditioner
from koala.data.encoding import to_pixels
from koala.data.latents import LatentSet
from koala.data.pictures import NOTICE, PictureSet
from koala.data.prepare import facts_of
from koala.distillation import checkpoint
from koala.distillation.loop import train
from koala.distillation.parallel import World, joined, lay_out
from koala.distillation.settings import PLAIN, Hardware, Training
from koala.distillation.speed import unet_flops
from koala.distillation.tasks import Denoising, Distillation, DistillationSettings, NoiseSchedule
from koala.errors import UserError
from koala.formats import (
    load_scheduler_config,
    load_unet,
    load_vae,
    resolve_model,
    unet_architecture,
)
from koala.generation.decode import TINY
from koala.mini.text import (
    TextData,
    TextDistillation,
    clip_tokenizer,
    new_text_encoders,
    start_from_words,
    vocabulary_words,
)
from koala.mini.tiny import TinyDistillation, new_tiny
from koala.mini.vae import Autoencoding, PictureData, measure_latents, new_vae
from koala.recipes.overrides import overridden
from koala.recipes.previews import MINI_PROMPTS, drawing
from koala.sentence import SentenceEncoder

MEMO = 2**31  # bytes of embeddings that a training on the CPU remembers: all of the mini set's
MEMO_ON_GPU = 2**29
HELD_OUT = 64  # samples of the validation
HELD_OUT_SPLITS = ("test", "test-pair")  # the first that a folder has


@dataclass(frozen=True)
class Mixture:
    """What a U-Net is shown: copies of each kind in an epoch, weights of the caption columns.

    None: everything once; the only column there is.
    """

    kinds: dict[str, int] | None = None
    captions: dict[str, float] | None = None


@dataclass(frozen=True)
class Base:
    """VAE and text side from nothing, with a U-Net as initialised: what a teacher starts from."""

    kinds: dict[str, int]  # copies of each kind of picture in an epoch of the VAE's
    vae: Training
    decoder: Training  # goes on from `vae` with the encoder at rest
    text: Training


@dataclass(frozen=True)
class Teacher:
    """A U-Net by L_task: from nothing, or `further` from the U-Net of the model given."""

    architecture: str
    training: Training
    caption_dropout: float
    mixture: Mixture
    min_snr: float | None = None  # as in `koala.distillation.tasks.Denoising`
    further: bool = False
    hardware: Hardware = PLAIN


@dataclass(frozen=True)
class Student:
    """A U-Net cut from the teacher's, then distilled."""

    cut: str
    training: Training
    settings: DistillationSettings
    mixture: Mixture
    hardware: Hardware = PLAIN
    teacher: str | None = None  # the model to learn from where --teacher names none
    of: str = "sdxl-mini"  # architecture of a teacher that is not here, for a dry run
    pixels: int | None = None  # side of the square bucket; data of another size are refused
    prompts: tuple[str, ...] = MINI_PROMPTS  # of previews


@dataclass(frozen=True)
class Tiny:
    """A tiny autoencoder that learns from a model's VAE; the model gets it as `vae_tiny`."""

    kinds: dict[str, int] | None  # copies of each kind of picture in an epoch; None: all once
    training: Training


Recipe = Base | Teacher | Student | Tiny
ALONE = (Base, Tiny)  # train in one process, without settings of hardware
UNCLAIMED = ("hardware", "teacher", "of", "pixels", "prompts")  # may differ when a run goes on


def distill(
    recipe: str | Recipe,
    data: str | Path,
    out: str | Path,
    teacher: str | None = None,
    device: str | None = None,
    settings: Sequence[str] = (),
    boards: Sequence[str] = (),
) -> Path:
    """Runs a recipe to its end and returns the folder of the finished pipeline, `out`/model.

    recipe: a name of `koala.recipes` or a configuration. data: a folder that `koala prepare` made.
    teacher: the model to learn from (for `Teacher`, the one whose VAE and text side it takes);
    recipes of the paper name their own.
    device: the GPU where there is one, else the CPU; of the processes that torchrun starts, each
    takes a GPU of its own. settings: "name=value", replacing the recipe's (`overrides`).
    boards: "tensorboard", "wandb". Run again, it goes on where it was, also on other hardware.
    UserError where something is unknown, missing or of no use; Failure where the training fails.
    """
    name = recipe if isinstance(recipe, str) else "of one's own"
    data, out = Path(data), Path(out)
    with joined(device) as world:
        with world.together():
            recipe = configured(recipe, settings)
            teacher = _teacher_of(recipe, teacher, world)
        if isinstance(recipe, Base):
            models = [_run_base(recipe, data, out, str(world.device), boards)]
        elif isinstance(recipe, Tiny):
            assert teacher is not None
            return _run_tiny(recipe, data, out, teacher, str(world.device), boards)
        else:
            assert teacher is not None
            models = _run(recipe, data, out, teacher, world, boards)
        with world.together():
            for model in models if world.first else ():
                _card(name, recipe, data, out, teacher).write(model)
    return models[0]


def configured(recipe: str | Recipe, settings: Sequence[str] = ()) -> Recipe:
    """The recipe, its settings replaced by those given as "name=value"; UserError as there."""
    recipe = recipes.get(recipe) if isinstance(recipe, str) else recipe
    return overridden(recipe, settings)


def _teacher_of(recipe: Recipe, given: str | None, world: World) -> str | None:
    """The teacher's name: the given one, else the recipe's own; None where none is needed."""
    if isinstance(recipe, Base) and given is not None:
        raise UserError(f"--teacher {given}: this recipe starts from nothing; leave it out")
    if isinstance(recipe, ALONE) and world.size > 1:
        raise UserError("this recipe trains in one process: start it without torchrun")
    teacher = given or (recipe.teacher if isinstance(recipe, Student) else None)
    if not isinstance(recipe, Base) and teacher is None:
        raise UserError(
            "this recipe needs --teacher: the folder or name of the model to learn from"
        )
    return teacher


def _run(
    recipe: Teacher | Student,
    data: Path,
    out: Path,
    teacher: str,
    world: World,
    boards: Sequence[str],
) -> list[Path]:
    """Trains and exports a U-Net: with each average, the main one first."""
    training = recipe.training
    with world.together():
        source = resolve_model(teacher)
        recipe.hardware.micro_batch(training.batch, world.size)
        mixture = recipe.mixture
        size = recipe.pixels if isinstance(recipe, Student) else None
        latents = LatentSet(data, source, mixture.kinds, mixture.captions, training.seed, size=size)
        held_out = _held_out(latents, recipe, source) if training.validate_every else None
        start = out / "start"
        if isinstance(recipe, Student) and world.first and not start.exists():
            compress(teacher, recipe.cut, start, "fp32", recipe.settings.depth_rule)
    conditioner = _conditioner(source, world.device, latents)
    task = (
        _teaching(recipe, source, conditioner, world.device)
        if isinstance(recipe, Teacher)
        else _distilling(recipe, source, start, conditioner, world.device)
    )
    layout = lay_out(task, recipe.hardware, world)
    claimed = {name: value for name, value in asdict(recipe).items() if name not in UNCLAIMED}
    train(
        task, latents, training, out, {"recipe": claimed}, layout=layout, held_out=held_out,
        boards=boards, flops=_flops(task, latents) if world.device.type == "cuda" else None,
    )  # fmt: skip
    models = [out / "model", *(out / f"model-ema-{length}" for length in training.ema_others)]
    with world.together():
        for length, model in zip(training.half_lives, models, strict=True) if world.first else ():
            unet = UNet2DConditionModel.from_config(task.trainable.config)
            unet.load_state_dict(checkpoint.average(out, length))
            task.export(unet, model)
    return models


def _held_out(latents: LatentSet, recipe: Teacher | Student, model: Path) -> dict[str, Any]:
    """A batch of pictures that the training is not shown, for its validation."""
    folder, captions = latents.index.files.folder, recipe.mixture.captions
    for split in HELD_OUT_SPLITS:
        if len(latents.index.select(split)):
            there = LatentSet(folder, model, None, captions, recipe.training.seed, split=split)
            return there.batch(0, HELD_OUT)
    raise UserError(
        f"{folder} has no held-out pictures to validate with: prepare with --held-out, or take "
        "a recipe whose validate_every is 0"
    )


def _flops(task: Denoising, latents: LatentSet) -> float:
    """FLOP of one sample's step: the teacher's forward pass, and the student's three times.

    A backward pass is two forward passes' work. Buckets have about the area of the square one.
    """
    side = latents.index.made_with["size"] // 8
    networks = [(3, task.trainable.config)]
    if task.teacher is not None:
        networks.append((1, task.teacher.config))
    return sum(times * unet_flops(config, side, side, task.tokens) for times, config in networks)


def _card(name: str, recipe: Recipe, data: Path, out: Path, teacher: str | None) -> card.Card:
    """The finished model's card: that of what it started from, and this training."""
    start = card.Card("")
    if isinstance(recipe, Base):
        trained = {"VAE": recipe.vae, "decoder": recipe.decoder, "text encoders": recipe.text}
    else:
        assert teacher is not None
        trained = {"U-Net": recipe.training}
        start = card.read(out / "start" if isinstance(recipe, Student) else resolve_model(teacher))
    facts = card.Trained(
        recipe=name,
        settings=asdict(recipe),
        samples={what: training.samples for what, training in trained.items()},
        data=facts_of(data),
        teacher=teacher and card.name_of(teacher),
        distilled=isinstance(recipe, Student) and recipe.settings.learns_from_teacher,
    )
    return card.trained_of(start, card.name_of(out / "model"), facts)


def described(recipe: Recipe) -> dict[str, Any]:
    """The configuration under its kind's name, for JSON."""
    return {type(recipe).__name__.lower(): asdict(recipe)}


def _conditioner(model: Path, device: torch.device, latents: LatentSet) -> TextConditioner:
    """The text side: on the device, or on the CPU where only previews need it."""
    stored = latents.index.made_with["text"]
    place = torch.device("cpu") if stored else device
    arch = unet_architecture(model)
    room = MEMO if place.type == "cpu" else MEMO_ON_GPU
    memo = room // (4 * arch.tokens * arch.context)
    return TextConditioner.from_folder(model, device=place, memo=memo)


def _teaching(
    recipe: Teacher, base: Path, conditioner: TextConditioner, device: torch.device
) -> Denoising:
    torch.manual_seed(recipe.training.seed)
    arch = architectures.get(recipe.architecture)
    if recipe.further:
        if (found := unet_architecture(base)) != arch:
            raise UserError(
                f"{base} has a U-Net {found.name}, this recipe goes on from {arch.name}: "
                "give the model that the recipe before it made"
            )
        unet = load_unet(base)
    else:
        unet = UNet2DConditionModel(**architectures.unet_config(arch))
    return Denoising(
        unet.to(device),
        conditioner,
        NoiseSchedule(load_scheduler_config(base)),
        base,
        caption_dropout=recipe.caption_dropout,
        min_snr=recipe.min_snr,
        draw=drawing(base, conditioner, device),
        prompts=MINI_PROMPTS,
    )


def _distilling(
    recipe: Student, teacher: Path, start: Path, conditioner: TextConditioner, device: torch.device
) -> Distillation:
    """The student is the teacher, cut: `start`, which stays as it was before distillation."""
    return Distillation(
        load_unet(start).to(device),
        load_unet(teacher),  # the task casts it before it takes it along
        conditioner,
        NoiseSchedule(load_scheduler_config(teacher)),
        recipe.settings,
        start,
        draw=drawing(teacher, conditioner, device),
        prompts=recipe.prompts,
    )


def _run_base(recipe: Base, data: Path, out: Path, device: str, boards: Sequence[str]) -> Path:
    """VAE, then text side, then a pipeline folder with the two and an untrained U-Net."""
    pictures = PictureSet(data)
    seen = pictures.select("train")
    torch.manual_seed(recipe.vae.seed)
    vae = new_vae(pictures.image(0).width).to(device, memory_format=torch.channels_last)
    shown = [pictures.image(i) for i in pictures.select("test-pair")[:16]]
    coding = Autoencoding(vae, to_pixels(shown))
    epoch = [i for kind, n in recipe.kinds.items() for i in pictures.select("train", kind) * n]
    painted = PictureData(pictures, epoch, recipe.vae.seed)
    note = {"recipe": asdict(recipe)}
    train(coding, painted, recipe.vae, out / "vae", note, boards=boards)
    measure_latents(vae, painted.every(len(epoch) // 1000 + 1).to(device))
    coding = coding.sharpening()
    train(coding, painted, recipe.decoder, out / "decoder", note, boards=boards)

    torch.manual_seed(recipe.text.seed)
    tokenizer = clip_tokenizer()
    encoders = new_text_encoders(tokenizer).to(device)
    sentences = SentenceEncoder(device)
    start_from_words(encoders, tokenizer, sentences)
    telling = TextDistillation(encoders, tokenizer, sentences).to(device)
    captions = sorted({pictures.rows[i][c] for i in seen for c in ("short", "long", "subject")})
    texts = TextData(captions, vocabulary_words(tokenizer), recipe.text.seed)
    train(telling, texts, recipe.text, out / "text", note, boards=boards)
    return assemble(out / "model", coding, telling, data)


def _run_tiny(
    recipe: Tiny, data: Path, out: Path, teacher: str, device: str, boards: Sequence[str]
) -> Path:
    """The tiny autoencoder, then the teacher's folder with it; its card stays the teacher's."""
    source, seed = resolve_model(teacher), recipe.training.seed
    latents = LatentSet(data, source, recipe.kinds, {"short": 1.0}, seed)
    torch.manual_seed(seed)
    task = TinyDistillation(
        new_tiny().to(device),
        load_vae(source).to(device),
        shown=latents.batch(0, 16)["latents"],
    )
    note = {"recipe": asdict(recipe)}
    trained = train(task, latents, recipe.training, out, note, boards=boards)
    model = out / "model"
    part = model.with_name(f".{model.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns(TINY))
    task.export(trained, part / TINY)
    shutil.rmtree(model, ignore_errors=True)
    part.rename(model)
    return model


def assemble(model: Path, coding: Autoencoding, telling: TextDistillation, data: Path) -> Path:
    """Writes the pipeline folder with `sdxl-mini`'s U-Net as initialised; replaces an older one."""
    part = model.with_name(f".{model.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    coding.export(coding.trainable, part / "vae")
    telling.export(telling.trainable, part)
    config = architectures.unet_config(architectures.get("sdxl-mini"))
    UNet2DConditionModel(**config).save_pretrained(part / "unet")
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    ).save_pretrained(part / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copy(data / NOTICE, part)
    shutil.rmtree(model, ignore_errors=True)
    part.rename(model)
    return model
