"""Latents of prepared pictures: encoded once by a model's VAE, then read by every training.

Beside each picture shard lies `latents-NNNNN.safetensors` (mean and deviation of the VAE's
posterior, float16 [n, 4, h, w], in the units the U-Net sees) and, once for all, `latents.json`,
which names the encoder by a hash: latents of one VAE mean nothing to another's U-Net.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from koala.conditioning import time_ids
from koala.data.pictures import PictureSet, shards_of
from koala.errors import UserError
from koala.formats import load_vae
from koala.progress import progress

BATCH = 64  # pictures that the VAE encodes at once


def to_pixels(images: list[Image.Image]) -> Tensor:
    """RGB pictures of one size as float32 [n, 3, h, w] in [-1, 1]."""
    pixels = np.stack([np.asarray(i, dtype=np.float32) for i in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def normalisation(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """(shift, scale), float32 [1, 4, 1, 1]: U-Net latents = (VAE latents - shift) * scale.

    As diffusers' SDXL pipeline undoes it: `latents_mean` and `latents_std` where the VAE's config
    has them, `scaling_factor` always.
    """
    mean, std = vae.config.latents_mean, vae.config.latents_std
    shift = torch.tensor(mean or [0.0] * 4).view(1, -1, 1, 1)
    deviation = torch.tensor(std or [1.0] * 4).view(1, -1, 1, 1)
    return shift, vae.config.scaling_factor / deviation


def encoder_hash(model: Path) -> str:
    """What names a model's latents: a hash of all that makes them (not the decoder), in fp16."""
    vae = load_vae(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(tensor.half().numpy().tobytes())
    for tensor in normalisation(vae):
        digest.update(tensor.half().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def prepare_latents(folder: Path, model: Path, device: str | torch.device = "cpu") -> int:
    """Encodes the prepared pictures in `folder` with the VAE of `model`; returns how many.

    Run again, it goes on where it was; with another VAE it refuses (UserError).
    """
    _claim(folder, encoder_hash(model))
    pictures = PictureSet(folder)
    vae = load_vae(model).to(device).eval()
    shift, scale = normalisation(vae)
    todo = [(p, out) for p in shards_of(folder) if not (out := _latents_of(p)).exists()]
    sizes = {p: PictureSet.rows_in(p) for p in shards_of(folder)}
    done = len(pictures) - sum(sizes[p] for p, _ in todo)
    with progress("encoding", len(pictures), "pictures", done) as advance:
        for shard, out in todo:
            part = PictureSet(shard)
            means, deviations = [], []
            for start in range(0, len(part), BATCH):
                indices = range(start, min(start + BATCH, len(part)))
                pixels = to_pixels([part.image(i) for i in indices])
                posterior = vae.encode(pixels.to(device)).latent_dist
                means.append((posterior.mean.cpu() - shift) * scale)
                deviations.append(posterior.std.cpu() * scale)
                advance(len(indices))
            columns = {"mean": torch.cat(means), "deviation": torch.cat(deviations)}
            tensors = {name: value.half().contiguous() for name, value in columns.items()}
            partial = out.with_suffix(".partial")
            save_file(tensors, partial)
            os.replace(partial, out)
    return len(pictures)


def _latents_of(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("pictures-", "latents-")).with_suffix(".safetensors")


def _claim(folder: Path, encoder: str) -> None:
    path = folder / "latents.json"
    if not path.exists():
        path.write_text(json.dumps({"encoder": encoder}) + "\n")
    elif (found := json.loads(path.read_text())["encoder"]) != encoder:
        raise UserError(
            f"{folder} holds latents of another VAE ({found}, this model's is {encoder}); "
            f"remove latents* there, or prepare into another folder"
        )


class LatentSet:
    """The training part of a prepared folder, as an endless ordered stream of batches.

    mix: how often an epoch shows the pictures of each kind, e.g. {"emoji": 3, "scene": 1}; kinds
    that it does not name are left out. captions: columns to choose a caption from, with weights.
    Which sample comes when, its caption and its draw from the posterior follow from the seed.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Path,
        mix: dict[str, int],
        captions: dict[str, float],
        seed: int,
    ):
        """Raises UserError where `folder` has no latents, or those of another VAE."""
        folder = Path(folder)
        pictures = PictureSet(folder)
        files = [_latents_of(p) for p in shards_of(folder)]
        if not all(f.exists() for f in files):
            raise UserError(
                f"{folder}: not all pictures have latents; run "
                f"`koala prepare ... --model {model} --out {folder}` to its end first"
            )
        _claim(folder, encoder_hash(model))
        loaded = [load_file(f) for f in files]
        self.mean = torch.cat([t["mean"] for t in loaded])
        self.deviation = torch.cat([t["deviation"] for t in loaded])
        if not torch.isfinite(self.mean).all():
            raise UserError(f"{folder}: latents that are not finite; prepare them again")
        if len(self.mean) != len(pictures):
            raise UserError(f"{folder}: {len(self.mean)} latents, {len(pictures)} pictures")
        self.rows = pictures.rows
        self.side = pictures.image(0).width  # pixels
        self.epoch = [i for kind, n in mix.items() for i in pictures.select("train", kind) * n]
        if not self.epoch:
            raise UserError(f"{folder}: no training pictures of the kinds {', '.join(mix)}")
        self.captions, self.seed = captions, seed

    def batch(self, first: int, count: int) -> dict[str, Any]:
        """{"latents": float32 [count, 4, h, w], "captions": strings, "time_ids": [count, 6]}."""
        order = shuffled(len(self.epoch), first, count, self.seed)
        picked = torch.tensor([self.epoch[k] for k in order])
        rng = np.random.default_rng((self.seed, first, 1))
        weights = np.array([*self.captions.values()])
        columns = rng.choice([*self.captions], size=count, p=weights / weights.sum())
        noise = torch.from_numpy(
            rng.standard_normal((count, *self.mean.shape[1:]), dtype=np.float32)
        )
        pair = (self.side, self.side)
        return {
            "latents": self.mean[picked].float() + self.deviation[picked].float() * noise,
            "captions": [self.rows[i][c] for i, c in zip(picked.tolist(), columns, strict=True)],
            "time_ids": time_ids([pair] * count, [(0, 0)] * count, [pair] * count),
        }


def shuffled(length: int, first: int, count: int, seed: int) -> list[int]:
    """Samples first..first+count-1 of an endless stream: every epoch a permutation of its own."""
    orders = {
        e: np.random.default_rng((seed, e)).permutation(length)
        for e in range(first // length, (first + count - 1) // length + 1)
    }
    return [int(orders[k // length][k % length]) for k in range(first, first + count)]
