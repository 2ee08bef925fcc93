"""Encodes samples with the VAE and, on request, the text encoders, into a U-Net's training data.

Shapes: n samples, h x w pixels; latents [n, 4, h/8, w/8].
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from koala.checkpoints.latent_scale import LatentScale
from koala.checkpoints.load import load_vae
from koala.checkpoints.tensors import pieces
from koala.checkpoints.validate import read_json, read_tensors
from koala.data.buckets import Size
from koala.data.captions import CaptionFitter
from koala.data.preprocess import Dropped, Preparation, Sample
from koala.text_conditioning import TextConditioner
from koala.utils.device import compute_dtype

BATCH_PIXELS = 4 << 20  # that the VAE encodes at once: four images at 1024 x 1024
NEGLIGIBLE = 0.1  # error of bf16, or of another VAE, that is small beside the posterior's deviation
PROBE = "probe.safetensors"  # of a prepared folder: what its VAE makes of one image
BATCH = 64  # images, at most
MIRRORED = "mirrored_"  # name prefix of a mirrored image's tensors
_SEEN = np.empty((0, 0, 3), dtype=np.uint8)


def to_pixels(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """RGB images of one size as float32 [n, 3, h, w] in [-1, 1]."""
    pixels = np.stack([np.asarray(i, dtype=np.float32) for i in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def encoder_hash(model: Path) -> str:
    """Identifies a model's latents: a hash of the encoder and the normalisation, in fp16."""
    digest = hashlib.sha256()
    for name, stored in sorted(read_tensors(model, "vae").items()):
        if name.startswith(("encoder.", "quant_conv.")):
            for piece in pieces(stored, "F16"):
                digest.update(piece)
    scale = LatentScale(read_json(model / "vae" / "config.json"))
    for tensor in (scale.mean, scale.factor / scale.std):
        digest.update(tensor.half().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class EncodedSample:
    """A sample without its pixels, with its tensors: one row of a shard."""

    sample: Sample
    tensors: dict[str, Tensor]  # bf16, on the CPU, without batch axis

    @property
    def group(self) -> tuple[str, str, Size]:
        """What all samples of a shard share: split, kind, bucket."""
        factor = 1 if "pixels" in self.tensors else 8
        height, width = (factor * side for side in next(iter(self.tensors.values())).shape[-2:])
        return self.sample.split, self.sample.kind, (height, width)


class Moments:
    """A model's VAE on a device: in fp32, or in bf16 on a GPU that has it if its error is small.

    Small is less than `NEGLIGIBLE` of the posterior's deviation, on an image that is the same in
    every process.
    """

    def __init__(self, model: Path, device: str | torch.device):
        self.device = torch.device(device)
        self.vae = load_vae(model).to(self.device, memory_format=torch.channels_last)
        self.scale = LatentScale(self.vae.config, self.device)
        self.in_bf16 = False
        if compute_dtype(self.device) == torch.bfloat16:
            error = self.bf16_error()
            self.in_bf16 = error < NEGLIGIBLE
            print(
                f"koala: in bf16 the VAE errs by {error:.2g} of its posterior's deviation: images "
                f"are encoded in {'bf16' if self.in_bf16 else 'fp32'}",
                file=sys.stderr,
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def probe(self) -> dict[str, Tensor]:
        """The posterior of an image that is always the same, in fp32 on the CPU: mean, deviation.

        Two VAEs of which it is the same make the same latents.
        """
        mean, std = self._encode(_probe(), in_bf16=False)
        return {"mean": mean.cpu().contiguous(), "deviation": std.cpu().contiguous()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def bf16_error(self) -> float:
        """Error of bf16 in the posterior's mean, relative to its deviation: root mean squares."""
        rounded, _ = self._encode(_probe(), in_bf16=True)
        return difference(self.probe(), rounded.cpu())

    @torch.inference_mode(False)  # a training uses the result
    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, float32 [n, 4, h/8, w/8], normalised.

        pixels: of one size, as returned by `to_pixels`; encoded a few images at a time.
        """
        at_once = max(1, BATCH_PIXELS // (pixels.shape[-1] * pixels.shape[-2]))
        parts = [self._encode(part, self.in_bf16) for part in pixels.split(at_once)]
        means, stds = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(stds)

    def _encode(self, pixels: Tensor, in_bf16: bool) -> tuple[Tensor, Tensor]:
        pixels = pixels.to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16):
            posterior = self.vae.encode(pixels).latent_dist
        std = posterior.std.float() / self.scale.std * self.scale.factor
        return self.scale.normalise(posterior.mean.float()), std


def difference(probe: Mapping[str, Tensor], mean: Tensor) -> float:
    """How far a mean is from that of a probe, relative to its deviation: root mean squares."""
    far = (mean - probe["mean"]).square().mean().sqrt()
    return float(far / probe["deviation"].square().mean().sqrt())


def _probe() -> Tensor:
    """An image [1, 3, 256, 256] with details of all sizes, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        F.interpolate(torch.randn(1, 3, side, side, generator=generator), size=256, mode="bicubic")
        for side in (2, 4, 8, 16, 32, 64, 128)
    ]  # with the spectrum of photographs: equal power in every octave
    return torch.stack(layers).sum(0).mul(0.25).clamp(-1, 1)


class Encoder:
    """Encodes samples with a model's VAE on a device."""

    def __init__(
        self, model: Path, device: str | torch.device, preparation: Preparation, seed: int
    ):
        """seed: of the draws from the posterior."""
        self.posterior, self.mirror, self.seed = preparation.posterior, preparation.mirror, seed
        self.moments = None if self.posterior == "pixels" else Moments(model, device)
        text = preparation.text
        self.conditioner = TextConditioner.from_folder(model, device=device) if text else None

    def unit(
        self, results: Iterable[Sample | Dropped], fitter: CaptionFitter
    ) -> tuple[list[EncodedSample], list[Dropped]]:
        """The encoded and the dropped items of a unit, each in order.

        fitter: fits the captions of stored embeddings; the samples keep the fitted captions.
        Samples whose latents are not finite are dropped.
        """
        waiting: dict[Size, list[tuple[int, Sample]]] = {}
        encoded: dict[int, EncodedSample | Dropped] = {}
        for number, result in enumerate(results):
            if isinstance(result, Dropped):
                encoded[number] = result
                continue
            height, width = result.pixels.shape[:2]
            batch = waiting.setdefault((height, width), [])
            batch.append((number, result))
            if len(batch) >= min(BATCH, max(1, BATCH_PIXELS // (height * width))):
                encoded.update(self._encode(waiting.pop((height, width)), fitter))
        for batch in waiting.values():
            encoded.update(self._encode(batch, fitter))
        rows = [encoded[number] for number in sorted(encoded)]
        return (
            [row for row in rows if isinstance(row, EncodedSample)],
            [row for row in rows if isinstance(row, Dropped)],
        )

    def _encode(
        self, batch: list[tuple[int, Sample]], fitter: CaptionFitter
    ) -> Iterator[tuple[int, EncodedSample | Dropped]]:
        tensors = self._tensors([sample for _, sample in batch])
        for row, (number, sample) in enumerate(batch):
            own = {name: value[row] for name, value in tensors.items()}
            if not all(value.isfinite().all() for value in own.values()):
                yield number, Dropped(sample.id, "not finite", "latents of the VAE")
                continue
            if self.conditioner is not None:
                rng = np.random.default_rng((self.seed, sample.digest))
                sample = replace(sample, captions=(fitter.fit(sample.captions[0], rng),))
                text, pooled = self.conditioner([*sample.captions])
                own |= {"text": text[0].bfloat16().cpu(), "pooled": pooled[0].bfloat16().cpu()}
            yield number, EncodedSample(replace(sample, pixels=_SEEN), own)

    def _tensors(self, samples: list[Sample]) -> dict[str, Tensor]:
        """bfloat16 [n, 4, h/8, w/8] on the CPU: "mean" and "deviation", or "draw".

        With `mirror` also those of the mirrored images, with the name prefix `MIRRORED`. Or
        "pixels", uint8 [n, 3, h, w], which can be mirrored without encoding.
        """
        if self.moments is None:
            stacked = np.stack([sample.pixels for sample in samples])
            return {"pixels": torch.from_numpy(stacked).permute(0, 3, 1, 2)}
        pixels = to_pixels([sample.pixels for sample in samples])
        tensors = self._latents(self.moments, pixels, samples)
        if self.mirror:
            mirrored = self._latents(self.moments, pixels.flip(-1), samples)
            tensors |= {MIRRORED + name: value for name, value in mirrored.items()}
        return tensors

    def _latents(
        self, moments: Moments, pixels: Tensor, samples: list[Sample]
    ) -> dict[str, Tensor]:
        mean, std = (tensor.cpu() for tensor in moments(pixels))
        if self.posterior == "moments":
            return {"mean": mean.bfloat16(), "deviation": std.bfloat16()}
        noise = [
            np.random.default_rng((self.seed, sample.digest)).standard_normal(
                mean.shape[1:], dtype=np.float32
            )
            for sample in samples
        ]
        return {"draw": (mean + std * torch.from_numpy(np.stack(noise))).bfloat16()}
