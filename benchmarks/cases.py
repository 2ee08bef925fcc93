"""What people's files, prompts and pictures get from koala: kinds of public bug reports, tried.

    PYTHONPATH=.:tests python -m benchmarks.cases [--only TEXT]

Each line of `ROWS` is a command on a toy input (`benchmarks/case_inputs.py`) and what it should
answer. `before` is what koala 0.1.0 answered to an input of that kind; a row without it is a
neighbour that was tried since. The counts and the answers go to `cases.json` beside this file, and
every row is a test (`tests/benchmarks/test_cases.py`).
"""

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.case_inputs import Inputs
from koala.checkpoints.inspect import inspect
from koala.cli import main as koala
from koala.generation.png import read_settings
from koala.utils.device import hardware

# Of koala 0.1.0: as it should be; another answer than the true one, in silence; a refusal that
# hides the reason or comes late; a refusal of what can be done now; a traceback.
GOOD, WRONG, BADLY, LACKING, CRASH = "good", "wrong", "refused badly", "refused", "crashed"


@dataclass(frozen=True)
class Row:
    """A command and the answer that is due.

    command: words, in which {kind NAME} stands for an input of `case_inputs` and {out} for a new
    path. says: a pattern that the answer has; `not_said`: one that it has not.
    """

    case: int
    report: str
    before: str | None
    command: tuple[str, ...]
    says: str = ""
    status: int = 0
    not_said: str = r"Traceback"
    holds: Callable[[Path], bool] | None = None  # of what was written

    @property
    def name(self) -> str:
        return f"{self.case} {self.report}"


@dataclass(frozen=True)
class Answer:
    """What a command said, and whether that is as it should be."""

    good: bool
    status: int
    text: str


def draw(model: str, *options: str, prompt: str = "a fox") -> tuple[str, ...]:
    small = ("--steps", "2", "--size", "64x64", "--seed", "1", "--device", "cpu")
    size = small[2:4] if "--image" not in options else ()
    return ("generate", prompt, "--model", model, *small[:2], *size, *small[4:], *options,
            "--out", "{out}.png")  # fmt: skip


def with_lora(name: str, scale: str = "") -> tuple[str, ...]:
    return draw("{model}", "--lora", f"{{lora {name}}}{scale}")


def convert(model: str, *options: str, to: str = "diffusers") -> tuple[str, ...]:
    ending = ".safetensors" if to == "single-file" else ""
    return ("convert", model, "--to", to, *options, "--out", f"{{out}}{ending}")


def compress(model: str, *options: str) -> tuple[str, ...]:
    return ("compress", model, "--to", "koala-700m", *options, "--out", "{out}")


def dry_run(model: str) -> tuple[str, ...]:
    return ("distill", "koala-lightning-700m-24gb", "--teacher", model, "--dry-run",
            "--card", "4090")  # fmt: skip


def predicts(what: str) -> Callable[[Path], bool]:
    return lambda out: inspect(out).prediction == what


def marked(out: Path) -> bool:
    """A single file with all that other programs look for."""
    from safetensors import safe_open

    with safe_open(out, "pt") as file:
        spec = file.metadata()["modelspec.prediction_type"]
        return {"v_pred", "ztsnr"} <= {*file.keys()} and spec == "v"


def said(**settings: object) -> Callable[[Path], bool]:
    """Settings in the PNG."""
    return lambda out: all(getattr(read_settings(out), k) == v for k, v in settings.items())


def sized(width: int, height: int) -> Callable[[Path], bool]:
    return lambda out: Image.open(out).size == (width, height)


V, V_ZERO, EPSILON = "v", "v, zero terminal SNR", "epsilon"
UNPACKING = r"Traceback|unpacking"
PAINT = ("--strength", "0.9", "--mask-blur", "0", "--image", "{picture plain.png}", "--mask")
LETTERS, TAGS = "a" * 400, ", ".join(f"tag {n}" for n in range(300))

ROWS: tuple[Row, ...] = (
    # v-prediction
    Row(1, "v_pred and ztsnr, convert", GOOD, convert("{checkpoint v and ztsnr}"),
        holds=predicts(V_ZERO)),
    Row(1, "v_pred and ztsnr, compress", GOOD, compress("{checkpoint v and ztsnr}"),
        holds=predicts(V_ZERO)),
    Row(1, "v_pred and ztsnr, inspect", WRONG, ("inspect", "{checkpoint v and ztsnr}"),
        rf"predicts +{V_ZERO}"),
    Row(1, "v_pred and ztsnr, generate", BADLY, draw("{checkpoint v and ztsnr}")),
    Row(1, "v_pred and ztsnr, dry run", BADLY, dry_run("{checkpoint v and ztsnr}"),
        rf"predicts +{V_ZERO}"),
    Row(1, "v_pred alone", None, ("inspect", "{checkpoint v alone}"), r"predicts +v\n"),
    Row(2, "a folder of v, to a single file", WRONG,
        convert("{folder v and ztsnr}", to="single-file"), holds=marked),
    Row(2, "a single file of v, to another", WRONG,
        convert("{checkpoint v and ztsnr}", to="single-file"), not_said="left out", holds=marked),
    Row(2, "a single file of v in bf16", None,
        convert("{checkpoint v and ztsnr}", "--dtype", "bf16", to="single-file"), holds=marked),
    Row(3, "kohya's metadata, convert", WRONG, convert("{checkpoint kohya's v}"),
        holds=predicts(V)),
    Row(3, "kohya's metadata, compress", WRONG, compress("{checkpoint kohya's v}"),
        holds=predicts(V)),
    Row(3, "kohya's metadata, inspect", WRONG, ("inspect", "{checkpoint kohya's v}"),
        r"predicts +v\n"),
    Row(3, "kohya's older metadata", None, ("inspect", "{checkpoint kohya's v, older}"),
        r"predicts +v\n"),
    Row(3, "kohya's metadata with zero terminal SNR", None,
        ("inspect", "{checkpoint kohya's v and ztsnr}"), rf"predicts +{V_ZERO}"),
    Row(3, "v-prediction in words", None, ("inspect", "{checkpoint v-prediction in words}"),
        r"predicts +v\n"),
    Row(3, "kohya's metadata, to a single file", None,
        convert("{checkpoint kohya's v and ztsnr}", to="single-file"), holds=marked),
    # EDM and flow matching
    Row(4, "EDM without betas, generate", CRASH, draw("{folder EDM without betas}"),
        "an EDM model", 2),
    Row(4, "EDM without betas, dry run", CRASH, dry_run("{folder EDM without betas}"),
        "an EDM model", 2),
    Row(4, "EDM without betas, compress", WRONG, compress("{folder EDM without betas}"),
        "an EDM model", 2),
    Row(4, "EDM with betas beside", WRONG, draw("{folder EDM with betas}"), "an EDM model", 2),
    Row(4, "EDM, a single file", GOOD, convert("{checkpoint Playground's}"), "an EDM model", 2),
    Row(4, "EDM, a single file, drawn", None, draw("{checkpoint Playground's}"), "an EDM model", 2,
        UNPACKING),
    Row(4, "CosXL", None, draw("{checkpoint CosXL's}"), "an EDM model", 2, UNPACKING),
    Row(4, "EDM by its class", None, convert("{folder EDM by its class}", to="single-file"),
        "an EDM model", 2),
    Row(4, "flow matching by its class", None, compress("{folder flow by its class}"),
        "a flow-matching model", 2),
    Row(4, "flow matching by its metadata", None, compress("{checkpoint flow by its metadata}"),
        "a flow-matching model", 2),
    Row(4, "no betas", None, compress("{folder no betas}"), "lacks beta_start", 2),
    # how steps are spaced
    Row(5, "DPM++ 2M Karras", BADLY, draw("{folder Karras}")),
    Row(5, "final_sigmas_type", BADLY, draw("{folder sigma_min}")),
    Row(5, "interpolation_type", BADLY, draw("{folder log_linear}")),
    Row(5, "LCM's", None, draw("{folder LCM}")),
    Row(5, "DDPM's", None, draw("{folder DDPM}")),
    Row(5, "PNDM's", None, draw("{folder PNDM}")),
    Row(5, "exponential", None, compress("{folder exponential}"), holds=predicts(EPSILON)),
    # which files a folder has
    Row(6, "fp16 variants only", LACKING, convert("{folder fp16 only}", to="single-file")),
    Row(6, "a U-Net with an fp16 variant only", LACKING, compress("{folder U-Net fp16 only}")),
    Row(6, "shards of an fp16 variant", LACKING, convert("{folder sharded, fp16}",
                                                        to="single-file")),
    Row(6, "fp16 variants only, drawn", None, draw("{folder fp16 only}")),
    Row(6, "bf16 variants only", None, draw("{folder bf16 only}")),
    Row(6, "pickles only", None, draw("{folder pickles only}"), r"\.bin", 2),
    Row(7, "shards", GOOD, draw("{folder sharded}")),
    Row(7, "a shard missing", GOOD, draw("{folder a shard missing}"), "00001-of-00002", 2),
    Row(7, "an index beside a whole file", GOOD, draw("{folder shards beside the file}")),
    Row(7, "links of the Hub's cache", GOOD, compress("{folder links of the Hub's cache}")),
    Row(7, "a dangling link", GOOD, draw("{folder a dangling link}"), "scheduler_config.json", 2),
    Row(7, "a shard alone", None, draw("{checkpoint shard-00001-of-00002}"),
        "is shard 1 of 2 of a model: give the model's folder", 2),
    # ballast and names
    Row(8, "position ids", GOOD, convert("{checkpoint position ids}"), "3 unused tensors"),
    Row(8, "EMA copies", GOOD, convert("{checkpoint EMA}"), "unused tensors"),
    Row(8, "EMA alone", None, convert("{checkpoint EMA alone}"), "1 unused tensors left out"),
    Row(8, "betas", GOOD, convert("{checkpoint betas}"), "3 unused tensors"),
    Row(8, "a tiny decoder inside", None, convert("{checkpoint a tiny decoder inside}")),
    Row(8, "a picture in the metadata", None,
        convert("{checkpoint a picture in its metadata}", to="single-file")),
    Row(9, "vae.", BADLY, convert("{checkpoint vae.}")),
    Row(9, "text_encoders.", BADLY, convert("{checkpoint Forge's text encoders}")),
    Row(9, "2-d attention of the VAE", BADLY, convert("{checkpoint 2-d attention of the VAE}")),
    Row(9, "ComfyUI's CLIP saver", None, convert("{checkpoint ComfyUI's CLIP saver}")),
    Row(9, "unknown names", None, convert("{checkpoint unknown names}"),
        r"no known part, such as clip_a.* lacks text_encoder, text_encoder_2: add --base", 2),
    Row(9, "fp8", None, convert("{checkpoint fp8}")),
    Row(9, "mixed dtypes", None, convert("{checkpoint mixed dtypes}")),
    # parts
    Row(10, "no VAE", LACKING, convert("{checkpoint no VAE}", "--vae", "{model}")),
    Row(10, "no VAE, nothing given", None, draw("{checkpoint no VAE}"), "add --vae FILE", 2),
    Row(10, "no text encoders", LACKING,
        convert("{checkpoint no text encoders}", "--base", "{model}")),
    Row(10, "a U-Net alone", LACKING, draw("{checkpoint U-Net alone}", "--base", "{model}")),
    Row(10, "a U-Net alone, bare", LACKING,
        draw("{checkpoint U-Net alone, bare}", "--base", "{model}")),
    Row(10, "a U-Net alone as ComfyUI saves it", None,
        draw("{checkpoint U-Net alone, diffusion_model.}", "--base", "{model}")),
    Row(10, "a U-Net alone, nothing given", None, draw("{checkpoint U-Net alone}"),
        "add --base MODEL", 2),
    Row(10, "a base without effect", None, draw("{checkpoint plain}", "--base", "{model}"),
        "has no effect", 2),
    Row(10, "a folder with a U-Net alone", None,
        convert("{folder a U-Net alone}", "--base", "{model}")),
    Row(10, "a folder with a U-Net alone, inspect", None, ("inspect", "{folder a U-Net alone}"),
        r"predicts +epsilon \(not stated"),
    Row(10, "a folder with a U-Net alone, nothing given", None, draw("{folder a U-Net alone}"),
        "a U-Net alone: add --base MODEL", 2),
    Row(10, "a folder with a VAE alone", None, draw("{folder a VAE alone}"),
        "a VAE alone, which the option --vae takes", 2),
    Row(10, "a VAE of another scale", None, convert("{model}", "--vae", "{folder a VAE alone}"),
        r"scaling_factor 0.18215, not 0.8"),
    Row(10, "a folder of one file", None, draw("{folder one file}"),
        "a folder of files: give .*four_steps.safetensors", 2),
    Row(11, "an inpainting file", GOOD, compress("{checkpoint 9 channels}"),
        "an inpainting U-Net", 2),
    Row(11, "an inpainting folder", BADLY, draw("{folder 9 channels}"), "inpainting", 2),
    Row(11, "a folder of the class Img2Img", None, convert("{folder Img2Img}")),
    Row(11, "the refiner's folder", None, draw("{folder refiner}"), "is the SDXL refiner", 2),
    Row(11, "a folder of Flux", None, draw("{folder Flux}"), "is a FluxPipeline", 2),
    Row(11, "an LCM's folder", None, compress("{folder an LCM}"), "a latent consistency model", 2),
    Row(11, "a folder of Kolors", None, draw("{folder Kolors}"), "Kolors", 2),
    # what is damaged
    Row(12, "NaN, compress", WRONG, compress("{checkpoint NaN}"), r"holds NaN", 2),
    Row(12, "NaN, convert", WRONG, convert("{checkpoint NaN}"), r"holds NaN", 2),
    Row(12, "NaN, generate", WRONG, draw("{checkpoint NaN}"), r"holds NaN", 2),
    Row(12, "NaN, a folder", None, draw("{folder NaN}"), r"conv_out.weight holds NaN", 2),
    Row(12, "NaN in a text encoder", None, compress("{checkpoint NaN in a text encoder}"),
        r"holds NaN", 2),
    Row(12, "infinite, the VAE", None, draw("{checkpoint infinite}"), r"holds NaN or infinite", 2),
    Row(12, "a LoRA of huge values", WRONG, with_lora("huge"),
        "a value in a LoRA, is too large", 1),
    Row(12, "an infinite LoRA", None, with_lora("infinite"), r"infinite", 2, "float32"),
    # LoRAs
    Row(13, "bundle_emb", BADLY, with_lora("bundle_emb"), r"left out: embeddings \(2"),
    Row(14, "stray names", BADLY, with_lora("stray names"), r"left out"),
    Row(14, "an orphan alpha", None, with_lora("an orphan alpha"), r"left out"),
    Row(14, "a training's state", None, with_lora("training state"), r"left out: training states"),
    Row(14, "norms and biases", None, with_lora("norms and biases"), r"left out"),
    Row(15, "OneTrainer's dots", BADLY, with_lora("OneTrainer's dots"), r"(\d+) of \1 modules"),
    Row(15, "ComfyUI's saver", BADLY, with_lora("ComfyUI's saver"), r"(\d+) of \1 modules"),
    Row(15, "PEFT with an adapter's name", None, with_lora("PEFT, an adapter's name"),
        r"(\d+) of \1 modules"),
    Row(15, "PEFT's own names", None, with_lora("PEFT's own"), r"(\d+) of \1 modules"),
    Row(15, "LyCORIS' own names", None, with_lora("LyCORIS alone"), r"(\d+) of \1 modules"),
    Row(16, "te2_text_projection", GOOD, with_lora("text projection"), "1 of 1 modules"),
    Row(16, "text encoders alone", GOOD, with_lora("text encoders alone"), r"(\d+) of \1 modules"),
    Row(16, "processor names", GOOD, with_lora("processor names"), r"(\d+) of \1 modules"),
    Row(16, "SimpleTuner's", GOOD, with_lora("SimpleTuner's"), r"(\d+) of \1 modules"),
    Row(16, "time and label embedding", GOOD, with_lora("time and label"), "4 of 4 modules"),
    Row(16, "a slider of rank 1", GOOD, with_lora("a slider"), r"(\d+) of \1 modules"),
    Row(17, "DoRA", LACKING, with_lora("DoRA"), r"DoRA.*(\d+) of \1 modules"),
    Row(17, "LoHa", LACKING, with_lora("LoHa"), r"LoHa.*(\d+) of \1 modules"),
    Row(17, "LoKr", LACKING, with_lora("LoKr"), r"LoKr.*(\d+) of \1 modules"),
    Row(17, "DoRA, inspect", WRONG, ("inspect", "{lora DoRA}"), "a DoRA"),
    Row(17, "DoRA of PEFT", None, with_lora("DoRA of PEFT"), r"DoRA.*(\d+) of \1 modules"),
    Row(17, "LoHa with DoRA", None, with_lora("LoHa with DoRA"), r"LoHa with DoRA"),
    Row(17, "whole differences", None, with_lora("whole differences"), r"(\d+) of \1 modules"),
    Row(17, "OFT", None, with_lora("OFT"), "OFT", 2),
    Row(17, "IA3", None, with_lora("IA3"), "IA3", 2),
    Row(17, "GLoRA", None, with_lora("GLoRA"), "GLoRA", 2),
    *(Row(17, f"{name}, inspect", None, ("inspect", f"{{lora {name}}}"),
          rf"an? {name}, which koala does not read")
      for name in ("GLoRA", "Control-LoRA", "ControlNet-LLLite", "T2I-Adapter",
                   "IP-Adapter FaceID", "hypernetwork")),
    Row(17, "Control-LoRA as a LoRA", None, with_lora("Control-LoRA"),
        "it is a Control-LoRA, which koala does not read", 2),
    Row(17, "a LoRA of Flux, inspect", None, ("inspect", "{lora of Flux}"),
        "a LoRA for Flux, which koala does not read"),
    Row(18, "B-LoRA for a student", WRONG,
        ("convert", "{lora B-LoRA}", "--for", "bk-sdxl", "--out", "{out}.safetensors"),
        r"made for sdxl: .*taken as made for sdxl"),
    Row(18, "B-LoRA in PEFT's names", None,
        ("convert", "{lora B-LoRA, as PEFT}", "--for", "bk-sdxl", "--out", "{out}.safetensors"),
        r"made for sdxl: .*taken as made for sdxl"),
    Row(19, "a textual inversion as a LoRA", BADLY, with_lora("textual inversion"), "--embedding",
        2),
    Row(19, "a textual inversion, inspect", BADLY, ("inspect", "{lora textual inversion}"),
        "a textual inversion of SDXL"),
    Row(19, "a textual inversion, drawn", None,
        draw("{model}", "--embedding", "{lora textual inversion}", prompt="a textual inversion")),
    Row(19, "a textual inversion of SD 1.5", None,
        draw("{model}", "--embedding", "{lora textual inversion of SD 1.5}"), "SD 1.5", 2),
    Row(19, "a textual inversion of diffusers", None,
        draw("{model}", "--embedding", "{lora textual inversion of diffusers}"), "", 2),
    Row(20, "kohya's alpha", GOOD, with_lora("kohya"), r"(\d+) of \1 modules"),
    Row(20, "alpha in bf16", GOOD, with_lora("bf16 alpha"), r"(\d+) of \1 modules"),
    Row(20, "no alpha", GOOD, with_lora("no alpha"), r"(\d+) of \1 modules"),
    Row(20, "PEFT's settings", GOOD, with_lora("PEFT's settings"), r"(\d+) of \1 modules"),
    Row(20, "rslora", GOOD, with_lora("rslora"), r"(\d+) of \1 modules"),
    Row(20, "a scale below 0", GOOD, with_lora("kohya", ":-0.5"), r"(\d+) of \1 modules"),
    Row(20, "alpha is nan", GOOD, with_lora("alpha nan"), "alpha of .* is nan", 2),
    Row(20, "matrices of NaN", GOOD, with_lora("NaN"), "NaN", 2),
    Row(20, "rank 0", GOOD, with_lora("rank 0"), "shape", 2),
    Row(20, "alpha as a vector", None, with_lora("alpha as a vector"), r"(\d+) of \1 modules"),
    Row(20, "fp8", None, with_lora("fp8"), r"(\d+) of \1 modules"),
    Row(20, "of SD 1.5", None, with_lora("SD 1.5"), "SD 1.5", 2),
    Row(20, "empty", None, with_lora("empty"), "empty|no LoRA|no tensors", 2),
    # prompts
    Row(21, "<lora:style:0.8>", WRONG,
        draw("{model}", "--lora-dir", "{folder of loras}", prompt="a fox <lora:kohya:0.8>"),
        holds=said(prompt="a fox", loras=(("kohya", 0.8),))),
    Row(21, "<lora:style:0.8> without a folder", None,
        draw("{model}", prompt="a fox <lora:kohya:0.8>"), "--lora-dir", 2),
    Row(21, "<lyco:style:0.8>", None,
        draw("{model}", "--lora-dir", "{folder of loras}", prompt="a fox <lyco:kohya:0.8>"),
        holds=said(prompt="a fox", loras=(("kohya", 0.8),))),
    Row(21, "<hypernet:style:0.8>", None, draw("{model}", prompt="a fox <hypernet:style:0.8>"),
        "hypernet", 2),
    Row(21, "<LORA:style:0.8>", None,
        draw("{model}", "--lora-dir", "{folder of loras}", prompt="a fox <LORA:kohya:0.8>"),
        holds=said(prompt="a fox", loras=(("kohya", 0.8),))),
    Row(21, "<lora:style> in the negative prompt", None,
        draw("{model}", "--guidance", "4", "--negative", "<lora:kohya:1>"), "negative prompt", 2),
    Row(22, "escaped brackets", GOOD, draw("{model}", prompt=r"a \(red\) fox")),
    Row(22, "(:d:0.8)", GOOD, draw("{model}", prompt="(:d:0.8)")),
    Row(22, "emoji and Chinese", GOOD, draw("{model}", prompt="🦊 一只狐狸")),
    Row(22, "400 letters", GOOD, draw("{model}", prompt=LETTERS)),
    Row(22, "300 tags", GOOD, draw("{model}", prompt=TAGS)),
    Row(22, "(10:15)", GOOD, draw("{model}", prompt="(10:15)"), "weight", 2),
    Row(22, "[cat:dog:0.5] and [a|b]", None, draw("{model}", prompt="a [cat:dog:0.5], [a|b]")),
    Row(22, "[cat::0.5] and nested", None, draw("{model}", prompt="a [cat::0.5] [(red:1.2)|b]")),
    Row(22, "BREAK", None, draw("{model}", prompt="a cat BREAK a dog")),
    Row(22, "brackets that do not close", None, draw("{model}", prompt="a ((cat, [dog:0.5")),
    Row(22, "AND", None, draw("{model}", prompt="a cat AND a dog"), "AND", 2),
    Row(23, "a prompt of several lines", GOOD, draw("{model}", prompt="a fox\nSteps: 20, Seed: 4"),
        holds=said(prompt="a fox\nSteps: 20, Seed: 4")),
    Row(23, "quotes", GOOD, draw("{model}", prompt='a "fox", 🦊'),
        holds=said(prompt='a "fox", 🦊')),
    # pictures
    *(Row(24, name, GOOD, draw("{model}", "--image", f"{{picture {name}}}"))
      for name in ("rgba.png", "la.png", "palette.png", "one bit.png", "cmyk.jpg", "animated.gif",
                   "wrong ending.jpg")),
    Row(24, "upright by EXIF", GOOD, draw("{model}", "--image", "{picture upright.jpg}"),
        holds=sized(48, 64)),
    Row(24, "truncated", GOOD, draw("{model}", "--image", "{picture truncated.png}"),
        "truncated.png cannot be read as an image", 2),
    *(Row(24, name, GOOD, draw("{model}", "--image", f"{{picture {name}}}"), "as an image", 2)
      for name in ("empty.png", "page.png", "drawing.svg")),
    Row(24, "16 bits of grey", GOOD, draw("{model}", "--image", "{picture 16 bits.png}")),
    Row(24, "odd sides", None, draw("{model}", "--image", "{picture odd sides.png}"),
        holds=sized(61, 83)),
    Row(25, "white strokes on an empty layer", WRONG,
        draw("{model}", *PAINT, "{picture strokes.png}")),
    Row(25, "a hole erased", WRONG, draw("{model}", *PAINT, "{picture erased.png}")),
    Row(25, "a hole erased in grey", None, draw("{model}", *PAINT, "{picture erased, grey.png}")),
    # scales
    Row(26, "F:0,8", BADLY, with_lora("kohya", ":0,8"), "LoRA scale is '0,8'", 2),
    Row(26, "F:80%", BADLY, with_lora("kohya", ":80%"), "LoRA scale is '80%'", 2),
    Row(26, "F:1e-1", BADLY, with_lora("kohya", ":1e-1"), r"(\d+) of \1 modules"),
    Row(26, "F:1.", BADLY, with_lora("kohya", ":1."), r"(\d+) of \1 modules"),
    *(Row(26, f"F{scale}", GOOD, with_lora("kohya", scale), r"(\d+) of \1 modules")
      for scale in (":-1", ":.5", ":+0.5")),
    Row(26, "F:", None, with_lora("kohya", ":"), "LoRA scale is ''", 2),
    Row(26, "F:nan", None, with_lora("kohya", ":nan"), "LoRA scale is", 2),
    Row(26, "--teacher-lora F:0,8", None,
        draw("{model}", "--teacher-lora", "{lora kohya}:0,8"), "LoRA scale is '0,8'", 2),
    # KOALA's own
    Row(27, "SDXL's LoRA on a student", GOOD,
        ("convert", "{lora of SDXL}", "--for", "koala-700m", "--out", "{out}.safetensors"),
        r"\d+ of 560 modules fit koala-700m; dropped"),
    Row(27, "a student to a single file", GOOD, convert("{student}", to="single-file")),
)  # fmt: skip


class Desk:
    """Answers rows, one after the other, in a folder."""

    def __init__(self, place: Path) -> None:
        self.place, self.inputs, self._outs = place, Inputs(place), 0
        os.environ["KOALA_CACHE"] = str(place / "cache" / "packages")
        os.environ["KOALA_BACKEND"] = "torch"

    def _word(self, word: str, out: Path) -> str:
        def made(found: re.Match) -> str:
            kind, _, name = found[1].partition(" ")
            if kind == "out":
                return str(out)
            if found[1] == "folder of loras":
                return str(self.inputs.lora("kohya").parent)
            if not name:
                return str(getattr(self.inputs, kind))
            return str(getattr(self.inputs, kind)(name))

        return re.sub(r"\{([^{}]+)\}", made, word)

    def ask(self, row: Row) -> Answer:
        """Runs the command of a row in this process."""
        self._outs += 1
        base = self.place / f"out{self._outs}"
        command = [self._word(word, base) for word in row.command]
        out = Path(command[-1])
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                status = koala(command)
            except Exception:
                status = -1
                traceback.print_exc(file=output)
        text = output.getvalue().replace(str(self.place), "").strip()
        good = (
            status == row.status
            and re.search(row.says, text) is not None
            and re.search(row.not_said, text) is None
            and (row.status != 2 or len(_lines(text)) == 1)
            and (row.status == 0 or not out.exists())
            and (row.holds is None or (status == 0 and row.holds(out)))
            and (row.case != 25 or self._kept(out))
        )
        return Answer(good, status, text)

    def _kept(self, out: Path) -> bool:
        """Whether the 12 places to the left of a mask were repainted, and no other pixel."""
        before = np.asarray(Image.open(self.inputs.picture("plain.png")))
        differs = (np.asarray(Image.open(out)) != before).any(-1)
        painted = differs[:32, :16]
        return bool(painted.mean() > 0.9) and differs.sum() == painted.sum()


def _lines(text: str) -> list[str]:
    """What koala says, besides what it does."""
    doing = ("koala: unpacking ", "koala: putting ")
    return [line for line in text.splitlines() if line and not line.startswith(doing)]


def main() -> None:
    """Asks every row and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", help="rows whose name holds this; writes nothing")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        desk = Desk(Path(name))
        for row in (row for row in ROWS if options.only in row.name):
            answer = desk.ask(row)
            rows.append(
                {"case": row.case, "report": row.report, "before": row.before or "not tried",
                 "now": GOOD if answer.good else "not as it should be", "status": answer.status,
                 "answer": " | ".join(answer.text.splitlines())[-300:]}
            )  # fmt: skip
            if options.only or not answer.good:
                print(json.dumps(rows[-1], indent=1, ensure_ascii=False), flush=True)
    known = [row for row in rows if row["before"] != "not tried"]
    record = {
        "command": "PYTHONPATH=.:tests python -m benchmarks.cases",
        "hardware": hardware(),
        "reports": len({row["case"] for row in rows}),
        "reported": len(known),
        "good_in_0.1.0": sum(row["before"] == GOOD for row in known),
        "good_now": sum(row["now"] == GOOD for row in known),
        "in_0.1.0": dict(Counter(row["before"] for row in known)),
        "neighbours": len(rows) - len(known),
        "neighbours_good_now": sum(r["now"] == GOOD for r in rows if r not in known),
        "rows": rows,
    }
    print(json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1))
    if not options.only:
        file = Path(__file__).with_suffix(".json")
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
