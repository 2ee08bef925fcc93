"""What `koala compress --advise` and docs/ladder.md know: the records' figures and the planner's.

`python -m benchmarks.ladder` writes `koala/generation/ladder.json` and prints the page's tables.
Nothing is measured here: what each way loses is read from the records of `benchmarks.fidelity`,
`benchmarks.pruning` and `koala evaluate`, the memory of the work is found by the memory planner on
meta tensors, and days of a training are the recipes' estimates.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory_plans import MODELS, SIZE, folder_of
from koala import recipes
from koala.architectures.table import get
from koala.errors import UserError
from koala.generation.advice import FILE, GIB, STUDENTS, cells, recorded, rungs
from koala.generation.memory.meta_models import TEXT, UNET, VAE, MetaModels
from koala.recipes.cost import estimate
from koala.utils.markdown import table

HERE = Path(__file__).parent
EVALUATION = HERE.parent / "docs" / "evaluation" / "report.json"
CARDS = ("4090", "3060", "4060")
BUDGET = 8  # GiB


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        models = {
            name: MetaModels(folder_of(name, Path(place)), None, SIZE, images=1) for name in MODELS
        }
        known = {
            "command": "python -m benchmarks.ladder",
            "work": work_of(models),
            "lost": lost(),
            "days": days(),
        }
        FILE.write_text(json.dumps(known, indent=1) + "\n")
        recorded.cache_clear()
        print(page(models["sdxl"]))


def work_of(models: dict[str, MetaModels]) -> dict[str, Any]:
    """Bytes of activations of each phase, in fp16, of one image with guidance."""
    any_of = models["sdxl"]
    return {
        "encode": any_of.work(TEXT, "fp16"),
        "denoise": {name: of.work(UNET, "fp16") for name, of in models.items()},
        "full": any_of.work(VAE, "fp16", None, "full"),
        "tiled": any_of.work(VAE, "fp16", None, "tiled"),
    }


def lost() -> dict[str, Any]:
    """The change of R@5 by each way, of what was measured."""
    rounded = _read(HERE / "fidelity" / "weights" / "fidelity.json")
    of_way = {row["way"]: row["R@5"] for row in rounded["rows"]}
    found = {
        kind: _change(of_way[f"weights {kind}"], of_way["fp32"], "koala-mini")
        for kind in ("int8", "int4")
    }
    report = HERE / "pruning" / "pruning.json"
    if report.exists():
        pruning = _read(report)
        rows = {(row["way"], row["share"]): row for row in pruning["rows"]}
        mine, whole = rows.get(("learned", 0.2)), rows.get(("whole", 0.0))
        if mine and whole:
            found["pruned"] = _change(mine["R@5"], whole["R@5"], pruning["model"])
    rows = {row["name"]: row["values"]["R@5"] for row in _read(EVALUATION)["rows"]}
    student, teacher = (statistics.mean(rows[name]) for name in ("koala-mini", "teacher"))
    found["koala-700m"] = _change(student, teacher, "koala-mini, once distilled")
    return found


def _change(value: float, whole: float, model: str) -> dict[str, Any]:
    return {"change": value / whole - 1, "model": model}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def days() -> dict[str, dict[str, float]]:
    """The days of each recipe on the cards that it fits."""
    found: dict[str, dict[str, float]] = {}
    for name in filter(None, STUDENTS.values()):
        for card in CARDS:
            try:
                cost = estimate(recipes.get(name), card=card)
            except UserError:
                continue
            if cost.total <= cost.room:
                found.setdefault(name, {})[card] = cost.days
    return found


def page(models: MetaModels) -> str:
    """The ladder of SDXL as docs/ladder.md has it."""
    parts = {
        part: {
            f"{k}.{name}": tuple(tensor.shape)
            for k, model in enumerate(models.models(part, "fp16"))
            for name, tensor in model.state_dict().items()
        }
        for part in (TEXT, VAE)
    }
    rows = [
        (*cells(rung)[:-1], f"`{rung.command}`")
        for rung in rungs("my-sdxl.safetensors", get("sdxl"), parts, BUDGET * GIB)
    ]
    return table(
        ("way", "time to make", "GB", "GiB at 1024 px", "arithmetic", "loses", "command"), rows
    )


if __name__ == "__main__":
    main()
