"""A complete training at toy size: real task, real loop, 10 steps in a few seconds.

Run as a program (`python toy_training.py BASE RUN`) it trains to the end, so that a test can kill
it and start it again.
"""

import sys
from pathlib import Path

import torch

from koala.conditioning import TextConditioner
from koala.distillation.loop import train
from koala.distillation.settings import Training
from koala.distillation.tasks import Denoising, NoiseSchedule
from koala.formats import load_scheduler_config
from toy import toy_unet

CAPTIONS = ("a red fox", "two green apples", "a drum")
SETTINGS = Training(
    samples=40, batch=4, lr=1e-3, ema_half_life=32, log_every=12, preview_every=16, save_every=0
)


class Stream:
    """Samples that are functions of their number; notes which ones were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, first: int, count: int, rank: int = 0, world: int = 1) -> dict:
        share = count // world
        numbers = range(first + rank * share, first + (rank + 1) * share)
        self.asked += numbers
        latents = [
            torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in numbers
        ]
        return {
            "latents": torch.stack(latents),
            "captions": [CAPTIONS[i % len(CAPTIONS)] for i in numbers],
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * share),
        }


def toy_task(base: Path) -> Denoising:
    """A seeded KOALA-shaped U-Net to be trained; `base`: a toy pipeline folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = toy_unet("koala")
    schedule = NoiseSchedule(load_scheduler_config(base))
    return Denoising(unet, TextConditioner.from_folder(base), schedule, base, caption_dropout=0.5)


if __name__ == "__main__":
    train(toy_task(Path(sys.argv[1])), Stream(), SETTINGS, Path(sys.argv[2]))
