"""`make demo`: eight prompts, drawn with the bundled model, on one contact sheet."""

import argparse
import sys
import time
from pathlib import Path

from koala.checkpoints.bundled import DEFAULT
from koala.errors import UserError
from koala.generation.loader import load
from koala.generation.png import check_writable
from koala.utils.atomic import new_file
from koala.utils.contact_sheet import contact_sheet

EIGHT_PROMPTS = (
    "a fox, noto style",
    "a red apple, flat twemoji style",
    "a rocket, 3d fluent style",
    "a car, flat twemoji style",
    "a strawberry, flat fluent style",
    "a whale, noto style",
    "a purple mushroom, solid icon",
    "two red apples on a light blue background, noto style",
)
SEED = 7
WIDEST = 256  # pixels: smaller images are enlarged by a whole factor, up to this


def demo(out: Path, model: str | Path = DEFAULT) -> Path:
    """Draws the eight prompts into the PNG `out`, prints the seconds of each; returns the path."""
    check_writable(out.parent)
    start = time.perf_counter()
    pipeline = load(model, say=print)
    print(f"loaded {pipeline.name} in {time.perf_counter() - start:.1f} s", flush=True)
    images = []
    for prompt in EIGHT_PROMPTS:
        start = time.perf_counter()
        images += pipeline(prompt, seed=SEED).images
        print(f"{time.perf_counter() - start:5.2f} s  {prompt}", flush=True)
    scale = max(1, WIDEST // images[0].width)
    title = f"{pipeline.name}: {pipeline.known.sampling.text()}, seed {SEED}"
    sheet = contact_sheet(images, list(EIGHT_PROMPTS), columns=4, scale=scale, title=title)
    with new_file(out) as part:
        sheet.save(part, format="PNG")
    print(f"sheet: {out.resolve()}")
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the sheet, a PNG")
    try:
        demo(parser.parse_args(arguments).out)
    except UserError as error:
        print(f"koala: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
