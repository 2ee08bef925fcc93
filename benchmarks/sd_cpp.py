"""Our GGUF files, drawn by stable-diffusion.cpp and held to diffusers' image of the same folder.

    pip install cyllama==0.2.18  # brings stable-diffusion.cpp, built for CPUs
    python -m benchmarks.sd_cpp [--only NAME] [--folder FOLDER]

Each U-Net that stable-diffusion.cpp knows, with random weights, SDXL's VAE and text encoders: 256 x
256 pixels, 2 steps of Euler at guidance 3.5, from torch's noise, which both programs have. The last
layers of U-Net and VAE are scaled so that noise and image have the deviations of real ones. PSNR
in dB; beside it that of another seed and of another prompt, which a file that is misread would
come near. Seconds are of one image in one process, the model being loaded; diffusers' are in fp32.
The result goes to `sd_cpp.json` beside this file.
"""

import argparse
import math
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from benchmarks.random_sdxl import BIG_G, CLIP, CLIP_L, SCHEDULER, VAE
from benchmarks.record import command, keep
from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.gguf_file import KNOWN
from koala.generation.export import export
from koala.utils.device import hardware

PROMPT, OTHER = "a red fox, oil on canvas", "a lighthouse at night"
NEGATIVE = "blurry"  # an empty one is all zeros in one program, and text in the other
PIXELS, STEPS, GUIDANCE, SEED = 256, 2, 3.5, 7
TOKENS = 77


def random_pipeline(name: str) -> StableDiffusionXLPipeline:
    """A model with random weights in fp16's values, and SDXL's own parts beside the U-Net."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(unet_config(get(name)))
    vae = AutoencoderKL(**VAE)
    clip = {**CLIP, "bos_token_id": 49406, "eos_token_id": 49407}
    text = CLIPTextModel(CLIPTextConfig(**clip, **CLIP_L))
    text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**clip, **BIG_G))
    latents = torch.randn(1, 4, PIXELS // 8, PIXELS // 8)
    added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.full((1, 6), float(PIXELS))}
    with torch.no_grad():
        noise = unet(latents, 500, torch.randn(1, TOKENS, 2048), added_cond_kwargs=added).sample
        unet.conv_out.weight /= noise.std()
        image = vae.decode(latents).sample
        vae.decoder.conv_out.weight *= 0.4 / image.std()
        vae.decoder.conv_out.bias -= vae.decode(latents).sample.mean((0, 2, 3))
    folder = BUNDLED / "koala-mini"
    tokenizers = [
        AutoTokenizer.from_pretrained(folder / part, model_max_length=TOKENS)
        for part in ("tokenizer", "tokenizer_2")
    ]
    scheduler = EulerDiscreteScheduler.from_config({**SCHEDULER, "timestep_spacing": "linspace"})
    pipe = StableDiffusionXLPipeline(vae, text, text_2, *tokenizers, unet, scheduler)
    return pipe.to(torch.float16)


def ours(folder: Path, prompt: str = PROMPT, seed: int = SEED) -> tuple[np.ndarray, float]:
    """diffusers' image of the folder, in fp32, and its seconds."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    drawn = pipe(
        prompt,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=PIXELS,
        width=PIXELS,
        generator=torch.Generator().manual_seed(seed),
    )
    return np.asarray(drawn.images[0], np.float64), time.perf_counter() - start


def theirs(file: Path) -> tuple[np.ndarray, float]:
    """stable-diffusion.cpp's image, and the seconds that it took once the file was loaded."""
    from cyllama import sd

    asked = sd.SDContextParams(str(file), n_threads=torch.get_num_threads(), vae_decode_only=True)
    asked.rng_type = asked.sampler_rng_type = sd.RngType.CPU
    with sd.SDContext(asked) as context:
        start = time.perf_counter()
        (image,) = context.generate(
            PROMPT,
            negative_prompt=NEGATIVE,
            width=PIXELS,
            height=PIXELS,
            seed=SEED,
            sample_steps=STEPS,
            cfg_scale=GUIDANCE,
            sample_method=sd.SampleMethod.EULER,
            scheduler=sd.Scheduler.DISCRETE,
        )
        return image.to_numpy().astype(np.float64), time.perf_counter() - start


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return round(10 * math.log10(255**2 / np.square(a - b).mean()), 1)


def measure(name: str, scratch: Path) -> dict[str, object]:
    """PSNR of each kind of file, and what it would be for another image."""
    folder = scratch / name
    random_pipeline(name).save_pretrained(folder)
    image, seconds = ours(folder)
    found: dict[str, object] = {
        "diffusers": {"seconds": round(seconds, 1)},
        "another_seed": psnr(ours(folder, seed=SEED + 1)[0], image),
        "another_prompt": psnr(ours(folder, OTHER)[0], image),
    }
    for dtype in ("fp16", "q8_0", "q4_0"):
        file = scratch / f"{name}-{dtype}.gguf"
        export(folder, "gguf", file, dtype)
        drawn, seconds = theirs(file)
        megabytes = round(file.stat().st_size / 1e6)
        found[dtype] = {"psnr": psnr(drawn, image), "seconds": round(seconds, 1), "mb": megabytes}
        file.unlink()
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=KNOWN, nargs="+", default=KNOWN)
    parser.add_argument("--folder", type=Path, help="for the models, some 12 GB")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        found = {name: measure(name, Path(scratch)) for name in asked.only}
    record = {
        "pixels": PIXELS,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "threads": torch.get_num_threads(),
        "models": found,
        "cyllama": version("cyllama"),
        "hardware": hardware(),
        "command": command("sd_cpp"),
    }
    keep(Path(__file__).with_suffix(".json"), record)


if __name__ == "__main__":
    main()
