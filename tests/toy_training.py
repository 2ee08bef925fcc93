"""Complete trainings at toy size: real tasks, real loop, 10 steps in a few seconds.

Run as a program (`python toy_training.py BASE RUN`) it trains to the end, so that a test can kill
it and start it again. `processes` starts the same function in several, as torchrun would.
"""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, multiprocessing

from koala.checkpoints.load import load_scheduler_config
from koala.distillation.forward_process import NoiseSchedule
from koala.distillation.loop import train
from koala.distillation.parallel import World, lay_out
from koala.distillation.settings import PLAIN, DistillationSettings, Hardware, Training
from koala.distillation.tasks import Denoising, Distillation
from koala.text_conditioning import TextConditioner
from toy import toy_unet

CAPTIONS = ("a red fox", "two green apples", "a drum")
SETTINGS = Training(
    samples=40, batch=4, lr=1e-3, ema_half_life=32, log_every=12, preview_every=16, save_every=0
)
# A single one: the checkpoint's moments are its gradient.
STEP = replace(SETTINGS, samples=4, validate_every=4)


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


class SignalledStream(Stream):
    """Sends this process a signal while the batch that begins at `at` is made."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__()
        self.at, self.number = at, number

    def batch(self, first: int, count: int, rank: int = 0, world: int = 1) -> dict:
        if first == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(first, count, rank, world)


def toy_task(base: Path) -> Denoising:
    """A seeded KOALA-shaped U-Net to be trained; `base`: a toy pipeline folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = toy_unet("koala")
    schedule = NoiseSchedule(load_scheduler_config(base))
    return Denoising(unet, TextConditioner.from_folder(base), schedule, base, caption_dropout=0.5)


def toy_distillation(base: Path) -> Distillation:
    """The same U-Net and a seeded SDXL-shaped teacher, with the paper's taps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        student = toy_unet("koala")
        teacher = toy_unet("sdxl")
    schedule = NoiseSchedule(load_scheduler_config(base))
    settings = DistillationSettings(normalise=True, min_snr=5.0, caption_dropout=0.5)
    conditioner = TextConditioner.from_folder(base)
    return Distillation(student, teacher, conditioner, schedule, settings, base)


def distil(
    base: Path,
    run: Path,
    hardware: Hardware = PLAIN,
    *,
    settings: Training = SETTINGS,
    world: World | None = None,
    data: Stream | None = None,
) -> None:
    """A whole distillation on such hardware."""
    task, world = toy_distillation(base), world or World()
    layout = lay_out(task, hardware, world)
    validation = [Stream().batch(100, n) for n in (4, 2)] if settings.validate_every else []
    train(task, data or Stream(), settings, run, layout=layout, validation=validation)


def state(run: Path, seen: int) -> dict[str, Tensor]:
    """What the checkpoint after `seen` samples holds."""
    return load_file(run / "checkpoints" / f"{seen:012d}" / "state.safetensors")


def gradient(run: Path) -> dict[str, Tensor]:
    """The clipped gradient of a single step's run, times 1 - beta_1."""
    return {name: v for name, v in state(run, STEP.batch).items() if name.endswith(".exp_avg")}


def norm(tensors: dict[str, Tensor]) -> float:
    """Of all of them together."""
    return sum(value.square().sum().item() for value in tensors.values()) ** 0.5


def processes(function: Callable[..., None], *arguments: object) -> None:
    """Runs function(rank, *arguments) in two processes with torchrun's environment.

    Both are forked from one that has imported what they need (conftest.py), and done nothing else.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        _process, (port, function, arguments), nprocs=2, start_method="forkserver"
    )


def _process(rank: int, port: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    function(rank, *arguments)


if __name__ == "__main__":
    train(toy_task(Path(sys.argv[1])), Stream(), SETTINGS, Path(sys.argv[2]))
