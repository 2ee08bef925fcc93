"""How much better a model of the mini family predicts noise on pictures that it was trained on.

L_task (min-SNR, gamma 1) of emoji under their short captions, always with the same noise: pictures
of the training, pairs of a concept and a style that it never showed together, and concepts that it
never showed. Learning by heart lowers the first alone.

`python -m benchmarks.held_out_loss --data data [--model koala-mini]` adds its finding to
`held_out_loss.json` beside this file. `data`: prepared with the model's VAE, see
`docs/mini-family.md`.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.record import command, keep_among
from koala.checkpoints.load import load_scheduler_config, load_unet
from koala.checkpoints.resolve import resolve_model
from koala.data.latents import LatentSet
from koala.distillation.forward_process import NoiseSchedule, generators_at
from koala.distillation.loop import VALIDATION_SEED
from koala.distillation.tasks import Denoising
from koala.text_conditioning import TextConditioner
from koala.utils.device import hardware

FILE = Path(__file__).with_suffix(".json")
SPLITS = ("train", "test-pair", "test-concept")
SAMPLES = 192


@torch.no_grad()
def losses(folder: Path, data: Path) -> dict[str, float]:
    """L_task by split; of a split with fewer pictures some come twice, with other noise."""
    task = Denoising(
        load_unet(folder).eval(),
        TextConditioner.from_folder(folder),
        NoiseSchedule(load_scheduler_config(folder)),
        folder,
        min_snr=1.0,
    )
    found = {}
    for split in SPLITS:
        stream = LatentSet(data, folder, {"emoji": 1}, {"short": 1.0}, split=split)
        stream.mirror = False  # what a sampler is asked for
        batch = stream.batch(0, SAMPLES)
        stream.close()
        loss = task.losses(batch, generators_at(VALIDATION_SEED, 0, SAMPLES))["loss"]
        found[split] = round(loss.item(), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="koala-mini")
    options = parser.parse_args()
    found = {
        "model": options.model,
        "L_task": losses(resolve_model(options.model), options.data),
        "samples of a split": SAMPLES,
        "hardware": hardware(),
        "command": command("held_out_loss"),
    }
    keep_among(FILE, found, "model")


if __name__ == "__main__":
    main()
