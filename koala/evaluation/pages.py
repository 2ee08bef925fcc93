"""Two HTML files of pictures, each whole in itself: the blind page, and all rows side by side.

The blind page shows one pair at a time, in random order and on random sides, without names. It
counts wins by keyboard and gives a win rate with Wilson's interval. No server is needed.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from koala.errors import UserError
from koala.evaluation.drawing import files_of
from koala.evaluation.pictures import at_size
from koala.evaluation.plan import Plan
from koala.generation.image_files import open_image
from koala.utils.atomic import write_text
from koala.utils.digest import digest

SMALL = 256 * 256  # pixels up to which pictures are kept without loss
QUALITY = 90  # of larger ones, as WebP
MOST = 400  # pairs or lines of a page: more would not open in a browser

_SIDE_BY_SIDE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Side by side</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }}
table {{ border-collapse: collapse; }}
th {{ position: sticky; top: 0; background: Canvas; text-align: left; }}
td, th {{ padding: .4rem; vertical-align: top; }}
td:first-child {{ max-width: 20rem; }}
img {{ display: block; max-width: 24rem; height: auto; }}
</style>
<table><thead><tr><th></th>{names}</tr></thead><tbody>
{rows}
</tbody></table></html>
"""


def write_pages(plan: Plan, blind: bool) -> list[str]:
    """Writes side-by-side.html of all rows, and blind.html of two; returns what to say of them.

    UserError for a blind page of other than two rows.
    """
    check_pair([row.name for row in plan.rows], blind)
    lines = list(islice(_lines(plan), MOST))
    total = sum(len(part.prompts.prompts) * len(part.seeds) for part in plan.parts)
    names = [row.name for row in plan.rows]
    paths = [plan.out / "side-by-side.html"]
    write_text(paths[0], side_by_side(names, lines))
    if blind:
        paths.append(plan.out / "blind.html")
        write_text(paths[1], blind_page(names, lines))
    held = (
        f" (the first {MOST} of {total:,}; --count chooses fewer prompts)" if total > MOST else ""
    )
    return [f"{path}{held}" for path in paths]


def check_pair(names: Sequence[str], blind: bool) -> None:
    if blind and len(names) != 2:
        raise UserError(f"--page compares two models, given are {len(names)}: --compare A B --page")


def _lines(plan: Plan) -> Iterable[tuple[str, list[str]]]:
    """Every prompt of every evaluation seed, with each row's picture as a data address."""
    for part in plan.parts:
        prompts = part.prompts.prompts
        every = [files_of(plan, part, row.runs[0]) for row in plan.rows]
        for i in range(len(every[0])):
            images = [at_size(open_image(files[i]), plan.size) for files in every]
            yield prompts[i % len(prompts)].text, [address(image) for image in images]


def address(image: Image.Image) -> str:
    """A picture as a data: address, WebP."""
    lossless = image.width * image.height <= SMALL
    image.save(buffer := io.BytesIO(), "WEBP", lossless=lossless, quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def blind_page(names: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The page for two models. lines: prompt and the two pictures' addresses."""
    pairs: list[Mapping[str, object]] = [
        {"prompt": prompt, "images": list(images)} for prompt, images in lines
    ]
    data = {"names": list(names), "pairs": pairs, "digest": digest([names, pairs])}
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("blind_page.html").read_text("utf-8")
    return template.replace("/*DATA*/", text)


def side_by_side(names: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with a line for each prompt and a column for each model."""

    def row(prompt: str, images: Sequence[str]) -> str:
        cells = "".join(f'<td><img src="{image}" alt=""></td>' for image in images)
        return f"<tr><td>{html.escape(prompt)}</td>{cells}</tr>"

    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return _SIDE_BY_SIDE.format(names=heads, rows="\n".join(row(*line) for line in lines))
