"""Whether a ControlNet that was trained for a teacher does its work on the student.

A ControlNet for edges is trained on the teacher (arXiv 2302.05543): a copy of its down and mid
blocks learns to add to its skip connections, and nothing else learns. Teacher and student then
draw the captions of held-out images, with the edges of those images and without, from the same
noise. How well an image follows is the F1 score of its edges against those asked for. The student
should follow at least 0.8 as well as its teacher. Other ways to give its residuals to the student
are measured as well (`other_maps`).

`OMP_NUM_THREADS=1 python -m benchmarks.control --teacher runs/sdxl-mini/model --student koala-mini
--data DATA --out runs/control` writes the ControlNet, `control.json` and `control.png`. DATA is a
folder of `koala prepare illustrations`. A ControlNet that is in --out already is not trained again.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks.looks import SHOWN, evenly, write_record
from koala.architectures.block_map import block_map
from koala.architectures.skip_map import skip_connections
from koala.architectures.table import UNetArchitecture
from koala.data.illustrations.images import ImageSet
from koala.distillation.forward_process import NoiseSchedule, draw_noise, generators_at
from koala.evaluation.statistics import interval, prompt_draws
from koala.generation import Pipeline, load
from koala.generation.control import Control
from koala.generation.denoise import Condition, Hint, Residuals
from koala.generation.image_inputs import to_pixels
from koala.generation.runtime.pytorch import residuals_of
from koala.text_conditioning import time_ids
from koala.utils.contact_sheet import image_grid
from koala.utils.progress import progress

EMBEDDING = (16, 32, 64, 64)  # channels of the layers that read the edges
STRONG = 0.25  # from here on a pixel is an edge


@dataclass(frozen=True)
class Training:
    """How the ControlNet is taught."""

    samples: int = 14_400
    images: int = 3072  # that the samples are of
    batch: int = 16
    learning_rate: float = 1e-3
    dropout: float = 0.2  # share of samples without their caption
    min_snr: float = 1.0
    seed: int = 0


def edges(image: Image.Image) -> Image.Image:
    """RGB, light where the brightness changes: the length of Sobel's gradient."""
    grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
    a = np.pad(grey, 1, mode="edge")
    rows, columns = a[:-2] + 2 * a[1:-1] + a[2:], a[:, :-2] + 2 * a[:, 1:-1] + a[:, 2:]
    across, down = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    length = np.hypot(across, down).clip(0, 1)
    return Image.fromarray((255 * length).round().astype(np.uint8)).convert("RGB")


def hint(image: Image.Image) -> Tensor:
    """The edges as a ControlNet takes them: float32 [1, 3, h, w] in 0..1."""
    return torch.from_numpy(to_pixels(edges(image)) / 2 + 0.5)


@torch.no_grad()
def prepared(pipeline: Pipeline, data: ImageSet, rows: list[int]) -> dict[str, Tensor]:
    """Latents, edges and text embeddings of images, one row of each."""
    latents, hints, text, pooled = [], [], [], []
    with progress("encoding", len(rows), "images") as advance:
        for i in rows:
            image = data.image(i)
            latents.append(pipeline.encode(torch.from_numpy(to_pixels(image))))
            hints.append((255 * hint(image)).to(torch.uint8))
            words = pipeline.conditioner([data.rows[i]["short"]])
            text.append(words[0])
            pooled.append(words[1])
            advance(1)
    columns = {"latents": latents, "hints": hints, "text": text, "pooled": pooled}
    return {name: torch.cat(parts) for name, parts in columns.items()}


def train(training: Training, teacher: str, data: ImageSet, out: Path) -> list[float]:
    """Trains a ControlNet of the teacher, its U-Net frozen, on L_task; returns the losses."""
    pipeline = load(teacher, "cpu", backend="torch")
    unet = pipeline.unet.requires_grad_(False)
    schedule = NoiseSchedule(pipeline.scheduler_config)
    torch.manual_seed(training.seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING).train()
    chosen = evenly(data.select("train", ("emoji", "scene")), training.images)
    given = prepared(pipeline, data, chosen)
    optimizer = torch.optim.AdamW(net.parameters(), training.learning_rate, weight_decay=0.01)
    steps = training.samples // training.batch
    decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=steps, pct_start=0.05
    )
    losses = []
    with progress("training", steps, "steps") as advance:
        for number, batch in enumerate(_batches(training, given, steps)):
            first = number * training.batch
            draws = draw_noise(
                batch["latents"].shape, schedule.steps,
                generators_at(training.seed, first, training.batch),
            )  # fmt: skip
            noisy = schedule.add_noise(batch["latents"], draws.noise, draws.timesteps)
            kept = (draws.share >= training.dropout).float()
            pairs = [(batch["hints"].shape[2], batch["hints"].shape[3])] * training.batch
            added = {
                "text_embeds": batch["pooled"] * kept[:, None],
                "time_ids": time_ids(pairs, [(0, 0)] * training.batch, pairs),
            }
            text = batch["text"] * kept[:, None, None]
            down, mid = net(
                noisy, draws.timesteps, text, controlnet_cond=batch["hints"].float() / 255,
                added_cond_kwargs=added, return_dict=False,
            )  # fmt: skip
            output = unet(
                noisy, draws.timesteps, text, added_cond_kwargs=added,
                down_block_additional_residuals=down, mid_block_additional_residual=mid,
            ).sample  # fmt: skip
            target = schedule.target(batch["latents"], draws.noise, draws.timesteps)
            errors = (output - target).square().mean((1, 2, 3))
            loss = (schedule.min_snr_weights(draws.timesteps, training.min_snr) * errors).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            decay.step()
            losses.append(loss.item())
            advance(1)
    net.save_pretrained(out)
    return losses


def _batches(training: Training, given: dict[str, Tensor], steps: int) -> Iterator[dict]:
    """Batches of the images in an order of their own for each epoch."""
    draw = torch.Generator().manual_seed(training.seed)
    number = len(given["latents"])
    epochs = -(-steps * training.batch // number)
    order = torch.cat([torch.randperm(number, generator=draw) for _ in range(epochs)])
    for step in range(steps):
        rows = order[step * training.batch : (step + 1) * training.batch]
        yield {name: column[rows] for name, column in given.items()}


# --- how well an image follows ----------------------------------------------------------------


def follows(image: Image.Image, asked: Image.Image) -> float:
    """F1 of an image's edges against those asked for, each to within a pixel; 0 to 1."""
    drawn, wanted = (np.asarray(edges(each))[..., 0] >= 255 * STRONG for each in (image, asked))
    if not drawn.any() or not wanted.any():
        return float(drawn.any() == wanted.any())
    precision, recall = (_near(wanted)[drawn].mean(), _near(drawn)[wanted].mean())
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _near(places: np.ndarray) -> np.ndarray:
    """The places and those beside them."""
    return np.asarray(Image.fromarray(places).convert("L").filter(ImageFilter.MaxFilter(3))) > 0


@dataclass(frozen=True)
class Pairs:
    """Held-out images with their captions."""

    prompts: list[str]
    images: list[Image.Image]

    @classmethod
    def of(cls, data: ImageSet, most: int) -> "Pairs":
        kept = {row["split"] for row in data.rows} - {"train"}
        rows = evenly(data.select(sorted(kept), ("emoji", "scene")), most)
        return cls([data.rows[i]["short"] for i in rows], [data.image(i) for i in rows])

    def drawn(self, pipeline: Pipeline, net: Path | None) -> list[Image.Image]:
        """An image of each caption from its own seed, by the image's edges if there is a net."""
        requests = []
        for seed, (prompt, image) in enumerate(zip(self.prompts, self.images, strict=True)):
            shown = {} if net is None else {"control": net, "control_image": edges(image)}
            requests += pipeline.requests(prompt, seed=seed, size=image.size, **shown)
        with progress("drawing", pipeline.steps(requests), "steps") as advance:
            return pipeline.draw(requests, on_step=lambda *_: advance(1)).images

    def scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        """How well each follows, [m]."""
        return np.array([follows(*pair) for pair in zip(images, self.images, strict=True)])


def other_maps(teacher: UNetArchitecture, student: UNetArchitecture) -> dict[str, list[list[int]]]:
    """Ways to give a teacher's residuals to a student's places: the numbers that each sums.

    "by block": a skip connection takes that of the block that its own inherits from, and the mid
    block's is left out or kept. "summed": besides, those of a removed resnet go to the resnet
    before it, which is of the same size.
    """
    theirs = {path: i for i, (path, _) in enumerate(skip_connections(teacher))}
    inherited, mid = block_map(teacher, student), [len(theirs)]
    own = [[theirs[inherited[path]]] for path, _ in skip_connections(student)]
    summed = [[*range(one[0], after[0])] for one, after in zip(own, [*own[1:], mid], strict=True)]
    return {
        "by block": [*own, []],
        "by block and mid": [*own, mid],
        "summed": [*summed, mid],
    }


def by_map(pipeline: Pipeline, net: Residuals, sums: list[list[int]]) -> None:
    """Makes a pipeline take the sums of these of a ControlNet's residuals. net: gives them all."""

    def residuals(x: Tensor, timesteps: Tensor, condition: Condition) -> tuple[list, Tensor]:
        down, mid = net(x, timesteps, condition)
        *own, last = (sum([*down, mid][i] for i in numbers) for numbers in sums)
        return own, last

    def hint(control: Control) -> Hint:
        return Hint(residuals, control.image, torch.tensor([control.scale]))

    pipeline.hint = hint


def compare(pairs: Pairs, net: Path, models: dict[str, str]) -> tuple[dict, Image.Image]:
    """How well teacher and student follow, and a sheet. models: both, the teacher first."""
    shown: dict[str, list[Image.Image]] = {"asked for": [edges(each) for each in pairs.images]}
    for name, model in models.items():
        pipeline = load(model, "cpu", backend="torch")
        shown[f"{name} without"] = pairs.drawn(pipeline, None)
        shown[f"{name} with"] = pairs.drawn(pipeline, net)
    control = pipeline.requests("a fox", control=net, control_image=shown["asked for"][0])[
        0
    ].control
    assert control is not None
    module = control.net.files.load(control.net.unet, torch.float32)
    every = residuals_of(module, range(len(control.net.files.residuals) + 1))
    assert pipeline.known.base is not None
    for name, sums in other_maps(control.net.unet, pipeline.known.base.unet).items():
        by_map(pipeline, every, sums)
        shown[f"student with, {name}"] = pairs.drawn(pipeline, net)
    scores = {name: pairs.scores(images) for name, images in shown.items() if name != "asked for"}
    shown["held out"] = pairs.images
    sheet = image_grid(
        {name: evenly(images, SHOWN) for name, images in shown.items()},
        evenly(pairs.prompts, SHOWN),
    )
    return {"residuals": control.net.line(), **figures(scores)}, sheet


def figures(scores: dict[str, np.ndarray]) -> dict:
    """Means, and what the student follows of what its teacher does, with 95 % intervals."""
    names = list(scores)
    moved = dict(zip(names, prompt_draws(list(scores.values())), strict=True))
    means = {name: float(values.mean()) for name, values in scores.items()}
    found: dict = {
        "follows": {n: asdict(interval(means[n], moved[n], [])) for n in names},
    }
    other = {name: means[name] + moved[name] for name in names}  # on other images
    for student in [name for name in names if name.startswith("student with,")] + ["student with"]:
        ratio = means[student] / means["teacher with"]
        draws = other[student] / other["teacher with"] - ratio
        gain = (means[student] - means["student without"]) / (
            means["teacher with"] - means["teacher without"]
        )
        gains = (other[student] - other["student without"]) / (
            other["teacher with"] - other["teacher without"]
        ) - gain
        found[f"{student}, over its teacher"] = {
            "follows": asdict(interval(ratio, draws, [])),
            "gain": asdict(interval(gain, gains, [])),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="name or folder of the teacher")
    parser.add_argument("--student", default="koala-mini", help="name or folder of its student")
    parser.add_argument("--data", type=Path, required=True, help="prepared illustrations")
    parser.add_argument("--samples", type=int, default=Training.samples, help="seen in training")
    parser.add_argument("--images", type=int, default=Training.images, help="that they are of")
    parser.add_argument("--pairs", type=int, default=64, help="held-out images (at most)")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    o = parser.parse_args()
    training, data = Training(samples=o.samples, images=o.images), ImageSet(o.data)
    o.out.mkdir(parents=True, exist_ok=True)
    net, log = o.out / "controlnet", o.out / "training.json"
    if not log.exists():
        start = time.process_time()
        losses = train(training, o.teacher, data, net)
        tenth = max(1, len(losses) // 10)
        log.write_text(json.dumps({
            **asdict(training), "loss_first_tenth": sum(losses[:tenth]) / tenth,
            "loss_last_tenth": sum(losses[-tenth:]) / tenth,
            "cpu_seconds": round(time.process_time() - start),
        }))  # fmt: skip
    pairs = Pairs.of(data, o.pairs)
    found, sheet = compare(pairs, net, {"teacher": o.teacher, "student": o.student})
    record = {
        "command": f"python -m benchmarks.control --samples {o.samples} --images {o.images} "
        f"--pairs {o.pairs}",
        "training": json.loads(log.read_text()),
        "pairs": len(pairs.images),
        **found,
    }
    write_record(record, sheet, o.out, "control")


if __name__ == "__main__":
    main()
