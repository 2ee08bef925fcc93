"""docs/ladder.md's sheet: what each way to a smaller model draws of the same prompts and noise.

`python -m benchmarks.ladder_sheet [--out docs/ladder.png]`

The bundled teacher, sdxl-mini, stands for a model of one's own: as it is, in fewer bits, pruned,
and cut; koala-mini for the cut once distilled, and koala-mini-guided for that in few steps. First
draws, none chosen. Pruning and calibrated 4 bits see the first half of the everyday prompts, with
other noise.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import koala
from benchmarks.sheet import EVERYDAY
from koala.checkpoints.compress import compress
from koala.generation.pruning import prune_model
from koala.generation.quantised_folder import write_quantised
from koala.utils.contact_sheet import image_grid

MODEL = "sdxl-mini"
PROMPTS = (
    "a fox, noto style", "a mushroom, noto style", "a butterfly, flat twemoji style",
    "a truck, flat fluent style", "a hammer, flat fluent style", "a dog",
    "a red car on a yellow background, flat twemoji style", "two cherries, flat fluent style",
)  # fmt: skip


def ways(scratch: Path) -> Iterator[tuple[str, str | Path, dict[str, str]]]:
    """Name of the row, the model, and options of `koala.load`."""
    everyday = EVERYDAY.read_text().splitlines()
    seen = everyday[: len(everyday) // 2]
    yield "as it is", MODEL, {}
    for kind in ("int8", "int4"):
        yield f"{kind[3:]} bits", MODEL, {"weights": kind}
    yield "4 bits, calibrated", write_quantised(MODEL, scratch / "4", calibrate=seen).out, {}
    yield "pruned by 20%", prune_model(MODEL, 0.2, seen, scratch / "pruned").out, {}
    yield "KOALA's cut, untrained", compress(MODEL, "koala-700m", scratch / "cut").out, {}
    yield "koala-mini: the cut, distilled", "koala-mini", {}
    yield "koala-mini-guided: in 4 passes", "koala-mini-guided", {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7, help="of the first; each next is one more")
    parser.add_argument("--out", type=Path, default=Path("docs/ladder.png"))
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = {
            name: koala.load(model, "cpu", **options)(list(PROMPTS), seed=o.seed).images
            for name, model, options in ways(Path(scratch))
        }
    image_grid(rows, PROMPTS).save(o.out, optimize=True)
    print(o.out)


if __name__ == "__main__":
    main()
