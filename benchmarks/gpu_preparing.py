"""The section of `benchmarks.gpu` on data: `koala prepare` against its VAE's limit, the loader."""

import io
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data
from benchmarks.gpu_run import Rows, Run
from koala.benchmark import measure
from koala.benchmark.models import new_vae
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.load import load_vae
from koala.data.encoding import BATCH_PIXELS
from koala.data.latent_preparation import prepare_latents
from koala.data.preprocess import Preparation
from koala.data.sources import recognise
from koala.data.workers import own_cores

MODEL = BUNDLED / "koala-mini"
IMAGES, SIZE = 512, (1274, 1457)  # LAION-POP's mean size


def preparing(run: Run) -> Rows:
    """Pictures a second of the VAE alone and of the whole command; samples of the loader."""
    side, images = (64, 8) if run.toy else (1024, IMAGES)
    vae = load_vae(MODEL) if run.toy else new_vae(run.device, torch.float32)
    vae = vae.to(run.device, memory_format=torch.channels_last)
    batch = 2 if run.toy else BATCH_PIXELS // side**2
    pixels = torch.randn(batch, 3, side, side, device=run.device)
    pixels = pixels.to(memory_format=torch.channels_last)

    limit, share = encoding(run, vae, pixels)
    yield {"what": "the VAE alone", "per_s": limit, "share_of_peak": share}
    with tempfile.TemporaryDirectory() as scratch:
        model, source = Path(scratch) / "model", Path(scratch) / "pictures"
        shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("unet", "vae_tiny"))
        vae.to("cpu", memory_format=torch.contiguous_format)  # the command loads its own
        vae.save_pretrained(model / "vae")
        measure.release(run.device)
        _draw(source, images, (80, 91) if run.toy else SIZE)
        start = time.perf_counter()
        workers = 1 if run.toy else own_cores()
        summary = prepare_latents(
            recognise(source), Path(scratch) / "out", model, Preparation(size=side), workers,
            str(run.device),
        )  # fmt: skip
        rate = summary.kept / (time.perf_counter() - start)
        # Starting the processes and reading the first pictures is in it.
        yield {"what": f"koala prepare, {workers} workers", "per_s": rate, "of_vae": rate / limit}
    if run.left > 0:
        found = data.loader(2 if run.toy else 60, 64 if run.toy else 1024)
        yield {"what": "the loader alone", "per_s": float(found["samples_per_s"])}


def encoding(run: Run, vae: AutoencoderKL, pixels: Tensor) -> tuple[float, float]:
    """Pictures a second that the VAE encodes as `koala prepare` asks it to; share of the peak."""

    @torch.inference_mode()
    def encode() -> None:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type != "cpu"):
            vae.encode(pixels)

    with FlopCounterMode(display=False) as counter:
        encode()
    seconds = measure.timing(encode, run.runs, run.device).median
    return len(pixels) / seconds, counter.get_total_flops() / seconds / run.ceilings.flops


def _draw(folder: Path, number: int, size: tuple[int, int]) -> None:
    """Photographs' worth of noise as JPEG files, each of other bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (46, 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    for n in range(number):  # what follows a JPEG's end is not read
        (folder / f"{n:04d}.jpg").write_bytes(buffer.getvalue() + n.to_bytes(4, "little"))
        (folder / f"{n:04d}.txt").write_text(f"a photograph, number {n}")
