"""`koala prepare`: from a source to latents with an index, and a contact sheet.

A path's source is recognised by `koala.data.sources` and encoded by
`koala.data.latent_preparation`. The illustration set is rendered first
(`koala.data.illustrations.images`).
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from koala.checkpoints.resolve import check_name, resolve_model
from koala.checkpoints.validate import read_json
from koala.data.illustrations.images import (
    ImageSet,
    check_images,
    prepare_images,
    settings_of,
)
from koala.data.illustrations.scenes import ILLUSTRATIONS, Illustrations
from koala.data.items import Source
from koala.data.preprocess import Filters, Preparation, with_captions
from koala.data.shards import CLAIM, Summary
from koala.data.sources import recognise
from koala.data.sources.hub import DATASETS, HubData
from koala.data.sources.parquet import Parquet
from koala.errors import UserError, did_you_mean
from koala.utils.atomic import check_claim, locked, new_file
from koala.utils.contact_sheet import contact_sheet
from koala.utils.device import check_device, pick_device
from koala.utils.extras import require

CAPTIONS = ("short", "subject", "long", "everyday")  # of the illustration set
SHEET = 60  # images on the contact sheet


@dataclass(frozen=True)
class PrepareReport:
    """The contents of the prepared folder."""

    out: Path
    pictures: dict[str, int]  # rendered illustrations: "split kind" -> number
    latents: Summary | None  # None if no model was given
    sheet: Path | None

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = []
        if self.pictures:
            lines.append(f"{sum(self.pictures.values()):7,} images in {self.out}")
            lines += [f"{n:7,} {what}" for what, n in sorted(self.pictures.items())]
        if self.latents:
            lines += self.latents.lines(self.out)
        return [*lines, f"contact sheet: {self.sheet}"] if self.sheet else lines


def preparation_of(source: str, settings: Mapping[str, Any]) -> Preparation | None:
    """The preparation of a source with the given settings; None if none is given.

    settings: fields of `Preparation` and `Filters` by name; None and False count as not given. The
    illustrations have a default size. UserError for an invalid value.
    """
    given = {n: v for n, v in settings.items() if v is not None and v is not False}
    if "captions" in given:
        given["captions"] = tuple(given["captions"])
    names = {field.name for field in fields(Filters)}
    filters = {name: given.pop(name) for name in names & given.keys()}
    if not given and not filters:
        return None
    if source in ILLUSTRATIONS:
        given.setdefault("size", ILLUSTRATIONS[source].size)
    return Preparation(**given, filters=Filters(**filters))


def prepare(
    source: str,
    out: str | Path,
    model: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    sheet: str | Path | None = None,
    kind: str | None = None,
    preparation: Preparation | None = None,
) -> PrepareReport:
    """Encodes the captioned images of `source` with the VAE of `model` into the folder `out`.

    source: a path (see `koala.data.sources`; `kind` resolves ambiguity), a data set's name on the
    Hugging Face Hub ("ORG/NAME", or "ORG/NAME:CONFIG"), or "illustrations" or
    "illustrations-small", which are rendered first, and only rendered if no model is given.
    preparation: size, captions, filters; None: the defaults; illustrations accept only size and
    mirroring. workers: processes that read images (default: all cores). sheet: PNG of a contact
    sheet to write.

    The same call resumes an interrupted run. UserError for an unknown source, an asset package
    that cannot be downloaded, a folder made with other settings or another VAE, workers below 1;
    Failure if the disk is full.
    """
    found = check(source, out, model, workers, device, sheet, kind, preparation)
    with locked(Path(out), f".lock-{os.environ.get('RANK', '0')}"):  # ranks share the folder
        if isinstance(found, Illustrations):
            mirror = preparation is not None and preparation.mirror
            return _prepare_illustrations(found, Path(out), model, workers, device, sheet, mirror)
        assert model is not None
        folder = resolve_model(model)
        images = found.fetch() if isinstance(found, HubData) else found
        from koala.data.latent_preparation import prepare_latents  # loads torch: after all checks

        preparation = preparation or Preparation()
        _tell_size(model, folder, preparation.size)
        summary = prepare_latents(images, Path(out), folder, preparation, workers, _device(device))
    return PrepareReport(Path(out), {}, summary, None)


def check(
    source: str,
    out: str | Path,
    model: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    sheet: str | Path | None = None,
    kind: str | None = None,
    preparation: Preparation | None = None,
) -> Source | HubData | Illustrations:
    """What `source` names. UserError for arguments of `prepare` that are wrong.

    Writes nothing, downloads nothing and loads no torch. The model need not be complete: parts of
    others may be meant for it.
    """
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers: must be at least 1")
    check_device(device)
    if device is not None and model is None:
        raise UserError(f"--device {device} applies to encoding: give --model too")
    if source in ILLUSTRATIONS:
        found: Source | HubData | Illustrations = _illustrations(
            source, Path(out), model, kind, preparation
        )
    else:
        found = _source(source, Path(out), model, sheet, kind, preparation or Preparation())
    if model is not None:
        check_name(model)
    return found


def _illustrations(
    source: str, out: Path, model: str | None, kind: str | None, preparation: Preparation | None
) -> Illustrations:
    settings = ILLUSTRATIONS[source]
    if preparation:
        settings = replace(settings, size=preparation.size)
    mirror = preparation is not None and preparation.mirror
    if kind or preparation not in (None, Preparation(settings.size, mirror=mirror)):
        raise UserError(
            f"{source} has fixed settings: give only --size, --mirror, --model, --device, --sheet"
        )
    if mirror and model is None:
        raise UserError("--mirror applies to latents: give --model too")
    check_images(settings, out)
    return settings


def _source(
    source: str, out: Path, model: str | None, sheet: str | Path | None, kind: str | None,
    preparation: Preparation,
) -> Source | HubData:  # fmt: skip
    if not Path(source).expanduser().exists() and (close := did_you_mean(source, ILLUSTRATIONS)):
        raise UserError(f"source {source!r} does not exist{close}")
    found = recognise(source, kind)
    if model is None:
        raise UserError(f"source {source} has images already: give --model to encode them")
    if sheet is not None:
        raise UserError(f"--sheet {sheet}: only the illustration set has a sheet; leave it out")
    if isinstance(found, HubData):  # nothing more is known before it is fetched
        require(f"source {source}", DATASETS, DATASETS)
        return found
    settings = asdict(with_captions(found, preparation))
    check_claim(out / CLAIM, {"source": found.name, **settings}, asdict(Preparation()))
    return found


def _tell_size(name: str, model: Path, size: int) -> None:
    """Says so where nobody chose a size, and the model was made for a smaller one."""
    config = model / "unet" / "config.json"
    side = read_json(config).get("sample_size") if config.is_file() else None
    if isinstance(side, int) and 8 * side < size == Preparation().size:
        print(
            f"koala: the images are stored for {size} pixels, {name} draws at {8 * side}: choose "
            "with --size",
            file=sys.stderr,
        )


def facts_of(folder: str | Path) -> dict[str, Any]:
    """The data's facts for a model card: number of training "pictures", and the settings."""
    if (Path(folder) / "set.json").exists():
        return {"pictures": len(ImageSet(folder).select("train")), **settings_of(Path(folder))}
    from koala.data.index import Index

    index = Index(folder)
    return {"pictures": int(index.rows[index.select("train")].sum()), **index.made_with}


def _prepare_illustrations(
    settings: Illustrations, out: Path, model: str | None, workers: int | None,
    device: str | None, sheet: str | Path | None, mirror: bool,
) -> PrepareReport:  # fmt: skip
    folder = None if model is None else resolve_model(model)
    prepare_images(settings, out, workers)
    latents = None
    if folder is not None:
        latents = encode_images(out, folder, _device(device), workers, mirror)
    images = ImageSet(out)
    counts = Counter(f"{row['split']} {row['kind']}" for row in images.rows)
    return PrepareReport(out, dict(counts), latents, _draw_sheet(images, sheet))


def encode_images(
    folder: Path, model: Path, device: str = "cpu", workers: int | None = 1, mirror: bool = False
) -> Summary:
    """Encodes all illustrations rendered into `folder`; the latents go to the same folder."""
    from koala.data.latent_preparation import prepare_latents

    source = Parquet(folder, CAPTIONS, "pictures-*.parquet")
    filters = Filters(max_aspect=None, keep_duplicates=True)
    size = settings_of(folder)["size"]
    preparation = Preparation(size, filters=filters, held_out=0.0, mirror=mirror)
    return prepare_latents(source, folder, model, preparation, workers, device)


def _draw_sheet(images: ImageSet, sheet: str | Path | None) -> Path | None:
    if sheet is None:
        return None
    chosen = sorted(random.Random(0).sample(range(len(images)), min(SHEET, len(images))))
    scale = max(1, 128 // images.image(0).width)
    captions = [images.rows[i]["short"] for i in chosen]
    drawn = contact_sheet([images.image(i) for i in chosen], captions, 10, scale)
    with new_file(Path(sheet)) as part:
        drawn.save(part, format="PNG")
    return Path(sheet)


def _device(asked: str | None) -> str:
    """The requested device or the best one; under torchrun each process has its own GPU."""
    import torch

    if asked is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        asked = f"cuda:{os.environ['LOCAL_RANK']}"
    return str(pick_device(asked))
