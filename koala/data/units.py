"""Divides a source into units of work.

A unit is a fixed number of consecutive items, and its output depends on those items alone. So any
process can do any unit, in any order, and a killed run loses only the units in progress.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from koala.data.items import Source
from koala.errors import UserError
from koala.utils.atomic import write_text

CHUNK = 8  # items that a process reads at once: 24 MiB of pixels at 1024 x 1024

Piece = tuple[str, int, int]  # part, first item, number of items


@dataclass(frozen=True)
class UnitPlan:
    """The parts of a source with their numbers of items, and the items per unit."""

    parts: dict[str, int]
    unit: int

    @property
    def items(self) -> int:
        """Items of the whole source."""
        return sum(self.parts.values())

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.items // self.unit)

    def size(self, unit: int) -> int:
        """Items of a unit; the last may have fewer."""
        return min(self.unit, self.items - unit * self.unit)

    def pieces(self, units: list[int]) -> Iterator[tuple[int, Piece]]:
        """(unit, piece) of these units, ascending, in the source's order."""
        wanted, start = iter(units), 0
        unit = next(wanted, None)
        for part, count in self.parts.items():
            while unit is not None and unit * self.unit < start + count:
                low = max(start, unit * self.unit)
                high = min(start + count, unit * self.unit + self.size(unit))
                for first in range(low, high, CHUNK):
                    yield unit, (part, first - start, min(CHUNK, high - first))
                if high < unit * self.unit + self.size(unit):
                    break  # continued in the next part
                unit = next(wanted, None)
            start += count


def plan_units(source: Source, out: Path, unit: int, pool: Executor | None) -> UnitPlan:
    """The plan of a source, cached in `out`/plan.json because counting takes a while.

    UserError if the source has changed since it was planned.
    """
    path, there = out / "plan.json", source.parts()
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))
        if changed := _changed(kept["parts"], there):
            what = "source" if changed == "." else f"source's part {changed}"
            raise UserError(
                f"{out} was started before the {what} changed, or for another source: prepare this "
                "one into another folder"
            )
        return UnitPlan(kept["counts"], unit)
    counts = (pool.map if pool else map)(source.count, there)
    plan = UnitPlan(dict(zip(there, counts, strict=True)), unit)
    if not plan.items:
        raise UserError(f"the source has no images: {', '.join(there)}")
    write_text(path, json.dumps({"parts": there, "counts": plan.parts}) + "\n")
    return plan


def _changed(before: dict[str, int], now: dict[str, int]) -> str | None:
    """The first part that is new, missing or different."""
    for part in sorted({*before, *now}):
        if before.get(part) != now.get(part):
            return part
    return None
