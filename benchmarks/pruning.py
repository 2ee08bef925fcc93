"""What pruning without training costs: R@5 and FD against the share of parameters and of FLOPs.

`python -m benchmarks.pruning --pictures data [--model koala-mini] [--cut 0,0,1,no-mid]`

`data`: a folder of `koala prepare illustrations`. Ways, at every share:

    learned     `koala compress --prune`, calibrated on captions of training pictures
    magnitude   the same modules, all narrowed alike: units with the smallest weights go
    random      the same widths, units by chance
    cut         KOALA's fixed map, of the depths `--cut`; at its own share

The output's error is measured on other captions than those that pruning saw. All are drawn with
the same prompts and seeds, and scored as `koala evaluate` scores the illustrations. The record
goes into OUT: pruning.json, pruning.md and pruning.png.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluator import build_evaluator, draw, relative_error
from benchmarks.record import command
from koala.architectures.block_map import tensor_map
from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.flops import flops
from koala.architectures.layout import parameters
from koala.architectures.table import FACTOR, UNetArchitecture, student_of
from koala.checkpoints.load import build_unet, load_unet
from koala.checkpoints.prune import (
    Level,
    Pruned,
    Site,
    choose,
    matrix,
    parameters_of,
    sites_of,
    what_is_seen,
)
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.unet_steps import Asked, evaluate
from koala.data.illustrations.images import ImageSet
from koala.evaluation.features import EffLite0, extract
from koala.evaluation.illustrations import choose as choose_pictures
from koala.evaluation.retrieval import Judge
from koala.generation.calibration import asked, calibration
from koala.generation.loader import load
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.pytorch import predictor
from koala.mini.sentence_encoder import SentenceEncoder
from koala.utils import markdown
from koala.utils.atomic import new_folder
from koala.utils.device import hardware
from koala.utils.networks import UNet2DConditionModel

Start = tuple[str, float, UNet2DConditionModel]  # way, share asked for, the U-Net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of `koala prepare`")
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--cut", help="depths of KOALA's map, or a name, such as koala-700m")
    parser.add_argument("--calibrate", type=int, default=16, help="captions that are drawn")
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("--judge", type=Path, help="judge.safetensors of a report on the model")
    parser.add_argument(
        "--unseen", type=int, default=8, help="captions whose inputs the output's error is of"
    )
    parser.add_argument(
        "--error", action="store_true", help="the output's error alone: no pictures, in minutes"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/pruning"), help="new folder")
    o = parser.parse_args()
    with new_folder(o.out) as folder:
        rows = measured(o)
        report = {
            "command": command("pruning"),
            "hardware": hardware(),
            "model": Path(o.model).name,
            "prompts": o.count,
            "rows": rows,
        }
        (folder / "pruning.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "pruning.md").write_text(table(rows) + "\n")
        plot(rows, folder / "pruning.png")
    print(table(rows))


def measured(o: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each start: shares that are left, the output's error, metrics of its pictures."""
    real = ImageSet(o.pictures)
    chosen, reference, train = choose_pictures(real, o.count)
    pipeline = load(o.model, "cpu", backend="torch")
    side = pipeline.unet.config.sample_size * FACTOR
    texts = [real.rows[i]["short"] for i in chosen]
    evaluator, extractor = None, EffLite0()
    if not o.error:
        judge = Judge.load(o.judge) if o.judge else None
        evaluator = build_evaluator(
            real, chosen, reference, train, (side, side), extractor, SentenceEncoder(), judge
        )
    seen = [real.rows[i]["short"] for i in train[: o.calibrate]]
    unseen = [asked(*one) for one in calibration(pipeline, texts[: o.unseen])]
    exact: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for way, share, unet in starts(pipeline, resolve_model(o.model), seen, o.shares, o.cut):
        with torch.no_grad():
            outputs = [evaluate(unet, one) for one in unseen]
        exact = exact or outputs
        row = {
            "way": way,
            "share": share,
            **size_of(unet, side),
            "error": relative_error(outputs, exact),
        }
        print(row, file=sys.stderr)
        if evaluator is not None:
            pipeline.unet, pipeline.predict = unet, predictor(unet)
            row |= evaluator.measure(extract(extractor, draw(way, pipeline, texts, [o.seed])))
        rows.append(row)
    for row in rows:
        for key in ("parameters", "FLOPs"):
            row[f"{key} left"] = row[key] / rows[0][key]
    return rows


def size_of(unet: UNet2DConditionModel, side: int) -> dict[str, int]:
    arch = from_unet_config(unet.config)
    return {"parameters": parameters(arch), "FLOPs": flops(arch, side, side, arch.tokens)}


# --- the starts ---------------------------------------------------------------------------------


def starts(
    pipeline: Pipeline,
    folder: Path,
    prompts: Sequence[str],
    shares: Sequence[float],
    cut: str | None,
) -> Iterator[Start]:
    """The whole U-Net, then every way at every share."""
    unet = load_unet(folder)
    yield "whole", 0.0, unet
    every: list[Asked] = [asked(*sample) for sample in calibration(pipeline, prompts)]
    arch, whole = from_unet_config(unet.config), (unet.config, unet.state_dict())
    sites = sites_of(arch)
    weights = {site.path: matrix(whole[1][f"{site.consumer}.weight"]) for site in sites}
    by_size = {site.path: by_magnitude(site, weights[site.path]) for site in sites}
    by_chance = {site.path: at_random(site, k) for k, site in enumerate(sites)}
    with tempfile.TemporaryDirectory() as scratch:
        seen, found = what_is_seen(*whole, sites, every, Path(scratch))
        for share in shares:
            chosen = choose(arch, sites, found, share)
            yield "learned", share, built(Pruned(*whole, sites, chosen, seen))
            for way, order in (("magnitude", by_size), ("random", by_chance)):
                chosen = alike(arch, sites, order, share)
                yield way, share, built(Pruned(*whole, sites, chosen, seen=None))
    if cut is not None:
        student = student_of(arch, cut)
        yield "cut", 1 - parameters(student) / parameters(arch), cut_of(unet, arch, student)


def built(pruned: Pruned) -> UNet2DConditionModel:
    """The U-Net, in memory."""
    unet = build_unet(pruned.config)
    unet.load_state_dict(dict(pruned))
    return unet.eval().requires_grad_(False)


def by_magnitude(site: Site, weights: Tensor) -> Tensor:
    """Units, the one whose weights in the consumer are largest first."""
    sizes = [float(weights[:, site.columns(torch.tensor([u]))].norm()) for u in range(site.units)]
    return torch.tensor(sizes).argsort(descending=True)


def at_random(site: Site, seed: int) -> Tensor:
    return torch.randperm(site.units, generator=torch.Generator().manual_seed(seed))


def alike(
    arch: UNetArchitecture, sites: Sequence[Site], order: Mapping[str, Tensor], share: float
) -> dict[str, Level]:
    """Every module narrowed by one factor, to its first units in an order."""
    goal, per_unit = share * parameters(arch), {s.path: parameters_of(arch, s) for s in sites}
    left, removed, kept = 1.0, 0, dict[str, int]()
    while removed < goal:
        left -= 1 / 128
        kept = {site.path: max(1, round(left * site.units)) for site in sites}
        removed = sum((site.units - kept[site.path]) * per_unit[site.path] for site in sites)
    return {
        site.path: Level(order[site.path][: kept[site.path]].sort().values, 0.0) for site in sites
    }


def cut_of(
    unet: UNet2DConditionModel, arch: UNetArchitecture, student: UNetArchitecture
) -> UNet2DConditionModel:
    """KOALA's cut, without training."""
    weights = unet.state_dict()
    smaller = build_unet(unet_config(student))
    smaller.load_state_dict(
        {name: weights[theirs] for name, theirs in tensor_map(arch, student).items()}
    )
    return smaller.eval().requires_grad_(False)


# --- the record ---------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    whole = rows[0].get("R@5")
    cells = []
    for row in rows:
        metrics = ("not measured",) * 3
        if whole:
            of_whole = f"{row['R@5'] / whole:.2f}"
            metrics = (f"{row['FD-EffLite0']:.2f}", f"{row['R@5']:.3f}", of_whole)
        left = (f"{row['parameters left']:.3f}", f"{row['FLOPs left']:.3f}")
        cells.append((row["way"], *left, f"{row['error']:.4f}", *metrics))
    head = ("way", "parameters left", "FLOPs left", "error of the output", "FD-EffLite0", "R@5",
            "of the whole's R@5")  # fmt: skip
    return markdown.table(head, cells)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """R@5 and FD against the parameters and FLOPs that are left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [name for name in ("error", "R@5", "FD-EffLite0") if name in rows[0]]
    figure = Figure(figsize=(9, 0.5 + 3.2 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), 2, squeeze=False)
    for line, metric in zip(panels, metrics, strict=True):
        for axes, left in zip(line, ("parameters left", "FLOPs left"), strict=True):
            for way in dict.fromkeys(row["way"] for row in rows[1:]):
                points = sorted(
                    (row[left], row[metric]) for row in rows if row["way"] in (way, "whole")
                )
                axes.plot(*zip(*points, strict=True), marker="o", label=way)
            axes.set_xlabel(left)
            axes.set_ylabel("error of the output" if metric == "error" else metric)
            if metric == "error":
                axes.set_yscale("symlog", linthresh=1e-3)
    figure.axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
