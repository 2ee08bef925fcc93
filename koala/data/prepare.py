"""`koala prepare`: from a source's name to pictures, latents and a sheet to look at."""

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from koala.data.illustrations import SMALL, Illustrations
from koala.data.pictures import PictureSet, prepare_pictures
from koala.errors import UserError
from koala.sheet import contact_sheet

SOURCES = {"illustrations": Illustrations(), "illustrations-small": SMALL}
SHEET = 60  # pictures on the contact sheet


@dataclass(frozen=True)
class PrepareReport:
    """What lies in the folder now."""

    out: Path
    pictures: dict[str, int]  # "split kind" -> how many
    latents: int  # pictures with latents; 0 where no model was given
    sheet: Path | None

    def lines(self) -> list[str]:
        """For the terminal."""
        counted = [f"{n:7,} {what}" for what, n in sorted(self.pictures.items())]
        latents = [f"latents of {self.latents:,} pictures"] if self.latents else []
        sheet = [f"contact sheet: {self.sheet}"] if self.sheet else []
        return [
            f"{sum(self.pictures.values()):7,} pictures in {self.out}",
            *counted,
            *latents,
            *sheet,
        ]


def prepare(
    source: str,
    out: str | Path,
    model: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    sheet: str | Path | None = None,
) -> PrepareReport:
    """Renders the pictures of `source` into `out` and, given a model, encodes their latents.

    Run again, it goes on where it was. UserError for an unknown source, a data package that
    cannot be had, a folder made with other settings or another VAE, workers below 1.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}; there are {', '.join(SOURCES)}")
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers: at least 1")
    if device is not None and model is None:
        raise UserError(f"--device {device} is for encoding latents: give --model too")
    out = Path(out)
    prepare_pictures(SOURCES[source], out, workers)
    latents = 0
    if model is not None:
        from koala.data.latents import prepare_latents
        from koala.device import pick_device
        from koala.formats import resolve_model

        latents = prepare_latents(out, resolve_model(model), pick_device(device))
    pictures = PictureSet(out)
    counts = Counter(f"{row['split']} {row['kind']}" for row in pictures.rows)
    return PrepareReport(out, dict(counts), latents, _draw_sheet(pictures, sheet))


def _draw_sheet(pictures: PictureSet, sheet: str | Path | None) -> Path | None:
    if sheet is None:
        return None
    chosen = sorted(random.Random(0).sample(range(len(pictures)), min(SHEET, len(pictures))))
    scale = max(1, 128 // pictures.image(0).width)
    captions = [pictures.rows[i]["short"] for i in chosen]
    contact_sheet([pictures.image(i) for i in chosen], captions, 10, scale).save(sheet)
    return Path(sheet)
