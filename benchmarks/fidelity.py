"""What every fast or small way of drawing costs: one model, the same noise, against its own fp32.

`python -m benchmarks.fidelity --pictures data [--model koala-mini] [--out benchmarks/fidelity]`

The squared error of an evaluation of the U-Net as a share of its square, on what the exact one is
given in its own drawings; PSNR of the latents (peak: the range of the fp32 ones) and of the
pictures, over all of them; FD-EffLite0 and retrieval against held-out real pictures, as `koala
evaluate` measures them. A way that loses more than 2 % of retrieval (R@5) is marked, and must not
be a default.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.evaluator import CHUNK, Evaluator, build_evaluator, draw, relative_error
from benchmarks.record import command
from koala.checkpoints.resolve import resolve_model
from koala.data.illustrations.images import ImageSet
from koala.errors import Failure, UserError
from koala.evaluation.features import EffLite0, extract
from koala.evaluation.illustrations import choose
from koala.evaluation.retrieval import Judge
from koala.generation.calibration import calibration
from koala.generation.decode import TINY
from koala.generation.loader import load
from koala.generation.pipeline import Pipeline
from koala.generation.quantised_folder import write_quantised
from koala.generation.runtime.openvino import UNetInputs
from koala.mini.sentence_encoder import SentenceEncoder
from koala.utils.atomic import new_folder
from koala.utils.device import hardware

EXACT = "fp32"
MOST_LOST = 0.02  # of R@5
CALIBRATE = 8  # captions of training pictures, that rounding is calibrated on


def _say(line: str) -> None:
    print(line, file=sys.stderr)


Loader = Callable[[str, str, Sequence[str]], Pipeline]  # of a model, a device, and captions


def _loaded(**asked: Any) -> Loader:
    return lambda model, device, captions: load(model, device, say=_say, **asked)


def _stored(calibrate: bool) -> Loader:
    """The model as `koala convert --weights int4` stores it, calibrated on the captions or not."""

    def loader(model: str, device: str, captions: Sequence[str]) -> Pipeline:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "int4"
            _say(write_quantised(model, out, calibrate=captions if calibrate else None).line())
            return load(out, device, decode="full", say=_say)

    return loader


Way = tuple[Loader, dict[str, Any]]  # and what is asked besides
WAYS: dict[str, Way] = {
    EXACT: (_loaded(weights="fp32", decode="full"), {}),
    "decode tiled": (_loaded(weights="fp32", decode="tiled"), {}),
    "decode tiny": (_loaded(weights="fp32", decode="tiny"), {}),
    "weights int8": (_loaded(weights="int8", decode="full"), {}),
    "weights fp8": (_loaded(weights="fp8", decode="full"), {}),
    "weights int4": (_loaded(weights="int4", decode="full"), {}),
    "stored in int4": (_stored(calibrate=False), {}),
    "stored in int4, calibrated": (_stored(calibrate=True), {}),
    "weights int8, decode tiny": (_loaded(weights="int8", decode="tiny"), {}),
    "weights bf16": (_loaded(weights="bf16", decode="full"), {}),
    "guidance until 0.75": (_loaded(weights="fp32", decode="full"), {"guidance_until": 0.75}),
    "guidance until 0.5": (_loaded(weights="fp32", decode="full"), {"guidance_until": 0.5}),
    "backend openvino": (_loaded(backend="openvino"), {}),
    "backend torch-bf16": (_loaded(backend="torch-bf16"), {}),
    "backend openvino-bf16": (_loaded(backend="openvino-bf16"), {}),
    "backend openvino-int8": (_loaded(backend="openvino-int8"), {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of `koala prepare`")
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/fidelity"), help="new folder")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--likeness", action="store_true", help="PSNR alone: no metrics of pictures, in less time"
    )
    parser.add_argument("--judge", type=Path, help="judge.safetensors of a report on the model")
    o = parser.parse_args()
    with new_folder(o.out) as folder:
        rows = measured(o)
        report = {
            "command": command("fidelity"),
            "hardware": hardware(),
            "prompts": o.count,
            "seeds": o.seeds,
            "rows": rows,
        }
        (folder / "fidelity.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "fidelity.md").write_text(table(rows) + "\n")
    print(table(rows))


def measured(o: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each way that this machine and model have; the others say why not."""
    real = ImageSet(o.pictures)
    chosen, reference, train = choose(real, o.count)
    side = load(o.model, "cpu").requests("x")[0].settings.width
    evaluator = None
    extractor = EffLite0().to(o.device)
    if not o.likeness:
        judge = Judge.load(o.judge) if o.judge else None
        evaluator = build_evaluator(
            real, chosen, reference, train, (side, side), extractor, SentenceEncoder(), judge
        )
    texts = [real.rows[i]["short"] for i in chosen]
    captions = [real.rows[i]["short"] for i in train[:CALIBRATE]]
    folder = resolve_model(o.model)
    given: list[UNetInputs] = []
    exact: tuple[Tensor, list[Image.Image], list[Tensor]] | None = None
    rows = []
    for name in dict.fromkeys([EXACT, *o.ways]):
        if "tiny" in name and not (folder / TINY).is_dir():
            rows.append({"way": name, "left out": f"the model has no {TINY}"})
            continue
        loader, asked = WAYS[name]
        try:
            pipeline = loader(o.model, o.device, captions)
            given = given or calibration(pipeline, texts[:CHUNK])
            outputs = evaluated(pipeline, given)
            latents, images = drawn(name, pipeline, texts, o.seeds, asked)
        except (UserError, Failure) as error:
            rows.append({"way": name, "left out": str(error)})
            continue
        exact = exact or (latents, images, outputs)
        rows.append(
            {
                "way": name,
                "error": relative_error(outputs, exact[2]),
                "PSNR latents": psnr(latents, exact[0], float(exact[0].max() - exact[0].min())),
                "PSNR pictures": psnr(as_numbers(images), as_numbers(exact[1]), 255.0),
                **(means(images, len(o.seeds), evaluator, extractor) if evaluator else {}),
            }
        )
    return rows


def drawn(
    name: str, pipeline: Pipeline, texts: Sequence[str], seeds: Sequence[int], asked: dict[str, Any]
) -> tuple[Tensor, list[Image.Image]]:
    """Final latents [n, 4, h, w] and pictures: each text once for each seed, seed by seed."""
    latents: list[Tensor] = []
    decode = pipeline.decode

    def recorded(x: Tensor) -> Tensor:
        latents.append(x.float().cpu())
        return decode(x)

    pipeline.decode = recorded
    images = draw(name, pipeline, texts, seeds, **asked)
    return torch.cat(latents), images


@torch.no_grad()
def evaluated(pipeline: Pipeline, given: Sequence[UNetInputs]) -> list[Tensor]:
    """The U-Net's outputs, as the pipeline computes them."""
    return [pipeline.predict(*one).float().cpu() for one in given]


def as_numbers(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).double()


def psnr(one: Tensor, other: Tensor, peak: float) -> float | None:
    """Decibels over all values; None where nothing differs."""
    error = (one.double() - other.double()).square().mean().item()
    return None if error == 0 else 10 * math.log10(peak**2 / error)


def means(
    images: Sequence[Image.Image], seeds: int, evaluator: Evaluator, extractor: nn.Module
) -> dict[str, float]:
    """The metrics, as the mean over the seeds."""
    features = extract(extractor, images).chunk(seeds)
    every = [evaluator.measure(of_seed) for of_seed in features]
    return {name: sum(each[name] for each in every) / seeds for name in every[0]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | error of an evaluation | PSNR latents, dB | PSNR images, dB "
        "| FD-EffLite0 | R@1 | R@5 | R@5 against fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    exact = rows[0].get("R@5")
    for row in rows:
        if "left out" in row:
            lines.append(f"| {row['way']} | left out: {row['left out']} | | | | | | |")
            continue
        likeness = [f"{row['error']:.4f}" if row["error"] else "equal"] + [
            "equal" if row[f"PSNR {of}"] is None else f"{row[f'PSNR {of}']:.1f}"
            for of in ("latents", "pictures")
        ]
        if "R@5" not in row:
            lines.append(f"| {' | '.join((row['way'], *likeness, *['not measured'] * 4))} |")
            continue
        change = row["R@5"] / exact - 1 if exact else math.nan
        mark = " **off by default**" if change < -MOST_LOST else ""
        figures = (f"{row['FD-EffLite0']:.2f}", f"{row['R@1']:.3f}", f"{row['R@5']:.3f}")
        cells = (row["way"], *likeness, *figures, f"{100 * change:+.1f} %{mark}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
