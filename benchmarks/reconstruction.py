"""What a VAE leaves of pictures: the judge's retrieval on held-out pictures, encoded and decoded.

No U-Net can draw better than that. And what it leaves of them with noise on the latents, of so many
of the latents' deviations: what a U-Net draws is never quite a latent of a picture. The judge is
trained on real pictures as in `koala evaluate`.

`python -m benchmarks.reconstruction --pictures data [--model koala-mini]` adds its finding to
`reconstruction.json` beside this file.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from benchmarks.evaluator import build_evaluator
from benchmarks.record import command, keep_among
from koala.checkpoints.load import load_vae
from koala.checkpoints.resolve import resolve_model
from koala.data.encoding import to_pixels
from koala.data.illustrations.images import ImageSet
from koala.evaluation.features import EffLite0, extract
from koala.evaluation.illustrations import choose
from koala.mini.sentence_encoder import SentenceEncoder
from koala.mini.vae import to_images
from koala.utils.device import hardware

PROMPTS = 200
BATCH = 32
NOISES = (0.2, 0.4)


@torch.inference_mode()
def encoded(images: ImageSet, indices: list[int], vae: AutoencoderKL) -> Tensor:
    """The pictures of `indices` as the VAE's means, [n, 4, h/8, w/8]."""
    parts = [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]
    pixels = (to_pixels([images.image(i) for i in part]) for part in parts)
    return torch.cat([vae.encode(some).latent_dist.mode() for some in pixels])


@torch.inference_mode()
def decoded(latents: Tensor, vae: AutoencoderKL, noise: float) -> list[Image.Image]:
    """Latents as pictures, with noise of so many of each channel's deviations on them."""
    draw = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rough = latents + noise * latents.std((0, 2, 3), keepdim=True) * draw
    return [image for some in rough.split(BATCH) for image in to_images(vae.decode(some).sample)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--model", default="koala-mini")
    options = parser.parse_args()
    images = ImageSet(options.pictures)
    chosen, reference, train = choose(images, PROMPTS)
    size = images.image(0).size
    extractor = EffLite0()
    evaluator = build_evaluator(
        images, chosen, reference, train, size, extractor, SentenceEncoder(), None
    )
    vae = load_vae(resolve_model(options.model), torch.float32).eval()
    latents = encoded(images, chosen, vae)

    def rebuilt(noise: float) -> dict[str, float]:
        features = extract(extractor, decoded(latents, vae, noise))
        return evaluator.judge.retrieval(features, evaluator.texts)

    found = {
        "size": list(size),
        "model": options.model,
        "real": evaluator.judge.retrieval(evaluator.own, evaluator.texts),
        "rebuilt": rebuilt(0.0),
        "rebuilt, latents with noise": {str(noise): rebuilt(noise) for noise in NOISES},
        "hardware": hardware(),
        "command": command("reconstruction"),
    }
    keep_among(Path(__file__).with_suffix(".json"), found, "size", "model")


if __name__ == "__main__":
    main()
