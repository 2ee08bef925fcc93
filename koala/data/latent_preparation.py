"""One run of `koala prepare`: encodes a source's images into shards of latents with an index.

The work is divided into units (`koala.data.units`): their items are read, filtered, resized and
cropped on all cores, encoded on the device, and written unit by unit (`koala.data.shards`). A
finished unit is never repeated, so the same command resumes a killed run. Under torchrun each
process does its share of the units, and the one that finds all of them finished writes the index.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save

from koala.data.captions import CaptionFitter
from koala.data.encoding import PROBE, EncodedSample, Encoder, encoder_hash
from koala.data.items import Source
from koala.data.preprocess import Preparation, unused_captions, with_captions
from koala.data.shards import (
    CLAIM,
    REPORT,
    Summary,
    merge,
    read_summary,
    remove_parts,
    unit_file,
    write_unit,
)
from koala.data.units import UnitPlan, plan_units
from koala.data.workers import own_cores, pool_of, read_ahead
from koala.errors import UserError
from koala.utils.atomic import claim, new_file
from koala.utils.progress import progress

HELD_OUT = 16  # images of a source, on average, if that is no more than the share below
HELD_OUT_SHARE = 0.1
SEED = 0  # of the draws from the posterior, if stored

T = TypeVar("T")


def prepare_latents(
    source: Source, out: Path, model: Path, preparation: Preparation,
    workers: int | None = None, device: str = "cpu",
) -> Summary:  # fmt: skip
    """Encodes a source with the VAE of a checked model folder; see `koala.data.prepare`."""
    chosen = bool(preparation.captions or source.captions)
    preparation = with_captions(source, preparation)
    rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    workers = workers or own_cores()
    if rank == 0 and not chosen and (unused := unused_captions(source, preparation)):
        print(
            f"koala: the captions are {', '.join(preparation.captions)}; not used are "
            f"{', '.join(unused)}: choose with --caption",
            file=sys.stderr,
        )
    with pool_of(workers) as pool:
        plan = plan_units(source, out, preparation.unit, pool)
        own = preparation.posterior != "pixels"  # pixels suit any VAE
        encoder_name = encoder_hash(model) if own else None
        made_with = {"encoder": encoder_name, "source": source.name, **asdict(preparation)}
        _claim(out, made_with)
        mine = range(rank, plan.units, world)
        todo = [unit for unit in mine if not unit_file(out, unit).exists()]
        if todo:
            remove_parts(out, {*todo})
            preparation = replace(preparation, held_out=_held_out(preparation, plan))
            encoder = Encoder(model, device, preparation, SEED)
            if encoder.moments is not None and not (out / PROBE).exists():
                with new_file(out / PROBE) as part:
                    part.write_bytes(save(encoder.moments.probe()))
            fitter = CaptionFitter.of(model, preparation.long_captions or "sentences")
            total = sum(map(plan.size, mine))
            done = total - sum(map(plan.size, todo))
            with progress("encoding", total, "pictures", done) as advance:
                chunks = read_ahead(source, plan, todo, preparation, pool, workers)
                for unit, some in groupby(chunks, key=lambda chunk: chunk[0]):
                    results = _counted((r for _, chunk in some for r in chunk), advance)
                    encoded, dropped = encoder.unit(results, fitter)
                    long = _long(encoded, preparation.captions, fitter)
                    write_unit(out, unit, encoded, dropped, long)
    return _finish(out, plan, preparation)


def _finish(out: Path, plan: UnitPlan, preparation: Preparation) -> Summary:
    """Writes index and report once all units are finished; UserError if no image is left."""
    left = sum(not unit_file(out, unit).exists() for unit in range(plan.units))
    if left:
        return Summary(units_left=left)
    summary = read_summary(out) or merge(out, plan.units, preparation.filters.keep_duplicates)
    if not summary.kept:
        counts = ", ".join(f"{n:,} {why}" for why, n in summary.dropped.items())
        with (out / REPORT).open(encoding="utf-8") as report:
            first = json.loads(report.readline())
        larger = _larger(summary, preparation)
        raise UserError(
            f"none of {plan.items:,} images is left ({counts}), such as {first['id']}: "
            f"{first['detail'] or first['reason']}; see {out / REPORT}{larger}"
        )
    return summary


def _larger(summary: Summary, preparation: Preparation) -> str:
    """What to do where all images are smaller than their buckets."""
    if {*summary.dropped} != {"small"} or preparation.filters.min_side is not None:
        return ""
    return f"; --size is {preparation.size}: give a smaller one, or --upscale, and another --out"


def _held_out(preparation: Preparation, plan: UnitPlan) -> float:
    """The share to hold out: more than asked of a small source, so that there is something.

    A share of 0 holds out nothing.
    """
    few = min(HELD_OUT_SHARE, HELD_OUT / plan.items)
    return max(preparation.held_out, few) if preparation.held_out else 0.0


def _counted(results: Iterable[T], advance: Callable[[int], object]) -> Iterator[T]:
    for result in results:
        yield result
        advance(1)


def _long(
    encoded: Sequence[EncodedSample], captions: Sequence[str], fitter: CaptionFitter
) -> dict[str, int]:
    """How many captions of each name the encoders would truncate."""
    return {
        name: sum(fitter.is_long(row.sample.captions[i]) for row in encoded)
        for i, name in enumerate(captions)
    }


# --- before the work ------------------------------------------------------------------------


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Records what the latents are made with; `UserError` for another VAE or settings."""
    path = out / CLAIM
    found = json.loads(path.read_text("utf-8")) if path.exists() else settings
    if found.get("encoder") != settings["encoder"]:
        raise UserError(
            f"{out} holds latents of another VAE ({found.get('encoder')}, this model's is "
            f"{settings['encoder']}); prepare into another folder, or remove this one's latents, "
            "units, *.arrow, plan.json and latents.json"
        )
    claim(path, settings, asdict(Preparation()))
