"""Toy inputs of the kinds that public bug reports name: checkpoints, folders, LoRAs, pictures.

Each is made when it is first asked for, from a toy SDXL (`tests/toy.py`), by its name in one of the
tables: `CHECKPOINTS`, `FOLDERS` and `PICTURES` below, `LORAS` in `case_loras.py`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.case_loras import LORAS, METADATA, NONE, Loras, Tensors, with_nan
from koala.checkpoints.convert import convert
from koala.checkpoints.ldm_keys import PREFIXES
from koala.checkpoints.pipeline_files import SCHEDULER
from koala.checkpoints.tensors import read_metadata
from koala.checkpoints.validate import WEIGHTS
from toy import toy_pipeline

Metadata = dict[str, str]
U, V = PREFIXES["unet"], PREFIXES["vae"]
L, G = PREFIXES["text_encoder"], PREFIXES["text_encoder_2"]
UNET = "unet/diffusion_pytorch_model.safetensors"
EDM = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5}
KOHYA_V = {"modelspec.prediction_type": "v", "ss_v_parameterization": "True"}


def add(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """Tensors beside the others; "__" in a name stands for a dot."""
    return lambda t: t | {name.replace("__", "."): tensor for name, tensor in more.items()}


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """The first pair that a name begins with is exchanged."""

    def name_of(name: str) -> str:
        found = next(((own, other) for own, other in pairs if name.startswith(own)), ("", ""))
        return found[1] + name.removeprefix(found[0]) if found[0] else name

    return lambda t: {name_of(name): tensor for name, tensor in t.items()}


def without(*prefixes: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {n: tensor for n, tensor in t.items() if not n.startswith(prefixes)}


def only(prefix: str, cut: str = "") -> Callable[[Tensors], Tensors]:
    return lambda t: {n.removeprefix(cut): x for n, x in t.items() if n.startswith(prefix)}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda t: t | {name: change(t[name].clone())}


def _ema(t: Tensors) -> Tensors:
    copies = {"model_ema." + n[6:].replace(".", ""): x.clone() for n, x in t.items() if U in n}
    return t | copies | {"model_ema.decay": torch.tensor(0.9999)}


def _ema_alone(t: Tensors) -> Tensors:
    return {n: x for n, x in _ema(t).items() if not n.startswith(U)}


def _fp8(t: Tensors) -> Tensors:
    kind = torch.float8_e4m3fn
    return {n: x.to(kind) if n.startswith(U) and x.ndim > 1 else x for n, x in t.items()}


CHECKPOINTS: dict[str, tuple[Callable[[Tensors], Tensors], Metadata]] = {
    "plain": (add(), {}),
    "v and ztsnr": (add(v_pred=NONE, ztsnr=NONE), {}),
    "v alone": (add(v_pred=NONE), {}),
    "kohya's v": (add(), KOHYA_V),
    "kohya's v, older": (add(), {"ss_v_parameterization": "true"}),
    "kohya's v and ztsnr": (add(), KOHYA_V | {"ss_zero_terminal_snr": "True"}),
    "v-prediction in words": (add(), {"modelspec.prediction_type": "v-prediction"}),
    "Playground's": (add(edm_mean=torch.zeros(4), edm_std=torch.ones(4)), {}),
    "CosXL's": (add(edm_vpred__sigma_max=torch.tensor(120.0)), {}),
    "flow by its metadata": (add(), {"modelspec.prediction_type": "rectified_flow"}),
    "position ids": (lambda t: t | {
        f"{L}text_model.embeddings.position_ids": torch.arange(32)[None],
        f"{G}transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
        f"{G}logit_scale": torch.tensor(4.6),
    }, {}),
    "EMA": (_ema, {}),
    "EMA alone": (_ema_alone, {}),
    "shard-00001-of-00002": (add(), {}),
    "betas": (add(alphas_cumprod=torch.zeros(9), betas=torch.zeros(9),
                  denoiser__sigmas=torch.zeros(9)), {}),
    "a tiny decoder inside": (add(taesd_decoder__layers__1__weight=torch.zeros(4)), {}),
    "a picture in its metadata": (add(), {
        "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 300_000,
        "modelspec.title": "x\ny", "modelspec.license": "CreativeML Open RAIL++-M",
    }),
    "fp8": (_fp8, {}),
    "mixed dtypes": (lambda t: {
        n: x.bfloat16() if n.startswith(U) else x.half() for n, x in t.items()}, {}),
    "vae.": (renamed((V, "vae.")), {}),
    "Forge's text encoders": (renamed((L, "text_encoders.clip_l.transformer."),
                                      (G.removesuffix("model."), "text_encoders.clip_g.")), {}),
    "ComfyUI's CLIP saver": (renamed((L, "clip_l.transformer."), (V, "vae.")), {}),
    "unknown names": (renamed((L, "clip_a."), (G, "clip_b.")), {}),
    "2-d attention of the VAE": (lambda t: {
        n: x[:, :, 0, 0] if ".attn_1." in n and x.ndim == 4 else x for n, x in t.items()}, {}),
    "no VAE": (without(V), {}),
    "no text encoders": (without(L, G), {}),
    "U-Net alone": (only(U), {}),
    "U-Net alone, bare": (only(U, U), {}),
    "U-Net alone, diffusion_model.": (only(U, "model."), {}),
    "9 channels": (changed(f"{U}input_blocks.0.0.weight", lambda x: torch.cat([x, x, x[:, :1]], 1)),
                   {}),
    "NaN": (changed(f"{U}out.2.weight", with_nan), {}),
    "NaN in a text encoder": (changed(f"{G}ln_final.weight", with_nan), {}),
    "infinite": (changed(f"{V}decoder.conv_out.bias", lambda x: x * float("inf")), {}),
}  # fmt: skip


def _edited(file: str, **changes: Any) -> Callable[[Path], None]:
    """Settings of a config; None takes one away."""

    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text()) | changes
        kept = {k: value for k, value in config.items() if value is not None or k not in changes}
        (folder / file).write_text(json.dumps(kept))

    return change


def _set(**values: Any) -> Callable[[Path], None]:
    """Settings of the scheduler."""
    return _edited(SCHEDULER, **values)


def _variant(name: str, *components: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for component in components or WEIGHTS:
            stem = folder / component / WEIGHTS[component]
            Path(f"{stem}.safetensors").rename(f"{stem}.{name}.safetensors")

    return change


def _shard(folder: Path, variant: str = "", missing: bool = False, stale: bool = False) -> None:
    file = folder / UNET
    tensors, stem = load_file(file), file.with_suffix("")
    names, infix = sorted(tensors), f".{variant}" if variant else ""
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    part = "{}{}-0000{}-of-00002.safetensors"
    for n, of in halves.items():
        save_file({x: tensors[x] for x in of}, part.format(stem, infix, n), {"format": "pt"})
    where = {x: Path(part.format(stem, infix, n)).name for n, of in halves.items() for x in of}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    Path(f"{stem}.safetensors.index{infix}.json").write_text(index)
    if not stale:
        file.unlink()
    if missing:
        Path(part.format(stem, infix, 1)).unlink()


def _hub_cache(folder: Path, dangling: bool = False) -> None:
    """As the Hub's cache, whose snapshots are folders of links."""
    whole = folder.rename(folder.with_name("moved"))
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    whole.rename(snapshot)
    files = sorted(p for p in snapshot.rglob("*") if p.is_file())
    for n, path in enumerate(files):
        shutil.move(path, blobs / f"{n:040x}")
        path.symlink_to(os.path.relpath(blobs / f"{n:040x}", path.parent))
    if dangling:
        (snapshot / SCHEDULER).resolve().unlink()


def _pickled(folder: Path) -> None:
    for component, stem in WEIGHTS.items():
        file = folder / component / f"{stem}.safetensors"
        file.rename(file.with_suffix(".bin"))


def _damaged(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    save_file(tensors | {"conv_out.weight": with_nan(tensors["conv_out.weight"])}, folder / UNET)


def _alone(component: str, **changes: Any) -> Callable[[Path], None]:
    """A folder with one network, as its authors publish it."""

    def change(folder: Path) -> None:
        part = (folder / component).rename(folder.with_name("part"))
        shutil.rmtree(folder)
        _edited("config.json", **changes)(part.rename(folder))

    return change


def _one_file(folder: Path) -> None:
    file = (folder / UNET).rename(folder.with_name("unet of a folder"))
    shutil.rmtree(folder)
    folder.mkdir()
    file.rename(folder / "four_steps.safetensors")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "plain": _set(),
    "v and ztsnr": _set(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "EDM without betas": _set(**EDM, beta_start=None, beta_end=None, beta_schedule=None),
    "EDM with betas": _set(**EDM),
    "EDM by its class": _set(_class_name="EDMEulerScheduler"),
    "flow by its class": _set(_class_name="FlowMatchEulerDiscreteScheduler"),
    "no betas": _set(beta_start=None),
    "Karras": _set(_class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True),
    "sigma_min": _set(final_sigmas_type="sigma_min"),
    "log_linear": _set(interpolation_type="log_linear"),
    "LCM": _set(_class_name="LCMScheduler", original_inference_steps=50),
    "DDPM": _set(_class_name="DDPMScheduler", variance_type="fixed_small", clip_sample=False),
    "PNDM": _set(_class_name="PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
    "exponential": _set(use_exponential_sigmas=True),
    "fp16 only": _variant("fp16"),
    "U-Net fp16 only": _variant("fp16", "unet"),
    "bf16 only": _variant("bf16"),
    "sharded": _shard,
    "sharded, fp16": lambda folder: _shard(folder, "fp16"),
    "a shard missing": lambda folder: _shard(folder, missing=True),
    "shards beside the file": lambda folder: _shard(folder, stale=True),
    "links of the Hub's cache": _hub_cache,
    "a dangling link": lambda folder: _hub_cache(folder, dangling=True),
    "pickles only": _pickled,
    "9 channels": _edited("unet/config.json", in_channels=9),
    "NaN": _damaged,
    "a U-Net alone": _alone("unet"),
    "a VAE alone": _alone("vae", scaling_factor=0.18215),
    "one file": _one_file,
    "Img2Img": _edited("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
    "refiner": _edited("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline",
                       requires_aesthetics_score=True, text_encoder=[None, None]),
    "Flux": _edited("model_index.json", _class_name="FluxPipeline"),
    "an LCM": _edited("unet/config.json", time_cond_proj_dim=256),
    "Kolors": _edited("unet/config.json", encoder_hid_dim_type="text_proj", encoder_hid_dim=4096),
}  # fmt: skip


# --- pictures -------------------------------------------------------------------------------


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _mask(ground: tuple[int, ...], left: tuple[int, ...]) -> Image.Image:
    """A mask of 64 x 64 with a place of 16 x 32 pixels of another colour."""
    mask = Image.new("RGBA" if len(ground) == 4 else "LA", (64, 64), ground)
    mask.paste(left, (0, 0, 16, 32))
    return mask


def _sixteen_bits(file: Path) -> None:
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(file)


def _upright(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(size=(64, 48)).save(file, exif=exif)


def _animated(file: Path) -> None:
    picture().save(file, save_all=True, append_images=[picture("L").convert("RGB")])


def _truncated(file: Path) -> None:
    picture().save(file)
    file.write_bytes(file.read_bytes()[:-200])


def _written(text: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(text) and None


def _saved(image: Image.Image, format: str | None = None) -> Callable[[Path], None]:
    return lambda file: image.save(file, format)


PICTURES: dict[str, Callable[[Path], None]] = {
    "plain.png": _saved(picture()),
    "upright.jpg": _upright,
    "rgba.png": _saved(picture("RGBA")),
    "la.png": _saved(picture("LA")),
    "palette.png": _saved(picture("P")),
    "one bit.png": _saved(picture("1")),
    "cmyk.jpg": _saved(picture("CMYK")),
    "animated.gif": _animated,
    "wrong ending.jpg": _saved(picture(), "PNG"),
    "odd sides.png": _saved(picture(size=(61, 83))),
    "truncated.png": _truncated,
    "empty.png": _written(b""),
    "page.png": _written(b"<!doctype html><html></html>"),
    "drawing.svg": _written(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "16 bits.png": _sixteen_bits,
    "strokes.png": _saved(_mask((255, 255, 255, 0), (255, 255, 255, 255))),
    "erased.png": _saved(_mask((255, 255, 255, 255), (0, 0, 0, 0))),
    "erased, grey.png": _saved(_mask((255, 255), (0, 0))),
}


class Inputs:
    """What the tables name, made in a folder when it is first asked for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.model = toy_pipeline(place / "sdxl")
        self.student = toy_pipeline(place / "student", seed=3, architecture="koala")
        self._single = convert(self.model, "single-file", place / "single.safetensors").out
        self._loras = Loras(self.model, place)

    def checkpoint(self, name: str) -> Path:
        """A single file, which states no more than the case gives it, its small files excepted."""
        file = self.place / f"checkpoint {name}.safetensors"
        if not file.exists():
            change, metadata = CHECKPOINTS[name]
            stated = {k: v for k, v in read_metadata(self._single).items() if "koala" in k}
            tensors = {n: t.contiguous() for n, t in change(load_file(self._single)).items()}
            save_file(tensors, file, stated | metadata)
        return file

    def folder(self, name: str) -> Path:
        """A model in diffusers' layout."""
        folder = self.place / f"folder {name}"
        if not folder.exists():
            shutil.copytree(self.model, folder)
            FOLDERS[name](folder)
        return next(folder.glob("snapshots/*"), folder)

    def lora(self, name: str) -> Path:
        """A LoRA, or what is taken for one."""
        file = self.place / f"{name}.safetensors"
        if not file.exists():
            tensors = {n: t.contiguous() for n, t in LORAS[name](self._loras).items()}
            save_file(tensors, file, METADATA.get(name))
        return file

    def picture(self, name: str) -> Path:
        file = self.place / name
        if not file.exists():
            PICTURES[name](file)
        return file
