"""`koala compress --advise`: every way to make a model smaller, with what each takes and loses.

From the headers of the model's files alone, without torch. What was measured, and what the memory
planner found, is in `ladder.json`, which `python -m benchmarks.ladder` writes from the records.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from koala.architectures.flops import flops
from koala.architectures.layout import inner_widths, parameters, tensor_shapes
from koala.architectures.table import CUTS, FACTOR, UNetArchitecture, get, student_of
from koala.checkpoints.pipeline_files import Contents
from koala.checkpoints.validate import Shapes
from koala.errors import UserError
from koala.generation.memory.estimate import GIB, PLACES, TEXT, UNET, VAE, Peak, peak, weights
from koala.generation.validation import loras
from koala.lora.assembly import read_parts

FILE = Path(__file__).with_name("ladder.json")
PLANNED = "1024x1024"  # pixels that the memory planner was asked for
PRUNED = 0.2  # the share that the ladder's row of pruning removes
# A student, and the recipe of one GPU that distils it.
STUDENTS: dict[str, str | None] = {
    "koala-1b": None,
    "koala-700m": "koala-lightning-700m-24gb",
    "0,1,2,no-mid": "koala-lightning-440m-8gb",
}
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Rung:
    """One way, for one model."""

    way: str
    time: str  # to make it
    disk: int  # bytes of all weights in half precision
    size: tuple[int, int]  # in pixels, that the arithmetic is of: the model's own
    memory: int | None  # bytes on a GPU at `PLANNED` pixels; None: not planned
    mode: str  # place and decoder that take it
    fits: bool | None  # in the budget; None: no budget, or not planned
    arithmetic: float  # of one evaluation of the U-Net, against the model's own
    loses: str
    command: str


def advise(
    model: str | Path,
    budget: int | None = None,
    base: str | None = None,
    vae: str | None = None,
    teacher_lora: Sequence[str] = (),
) -> list[Rung]:
    """The ladder of one model, from its headers alone.

    model: name, folder, Hub id or single file. budget: bytes on the GPU. The others: its parts, as
    `koala compress` takes them, so do the ladder's commands. UserError as from `assembled`.
    """
    contents, _ = read_parts(model, base, vae, loras(teacher_lora))
    parts = {part: _shapes(contents, names) for part, names in _COMPONENTS.items()}
    given = [("--base", base), ("--vae", vae), *(("--teacher-lora", lora) for lora in teacher_lora)]
    options = [f" {option} {shlex.quote(value)}" for option, value in given if value is not None]
    return list(rungs(str(model), contents.architecture, parts, budget, "".join(options)))


@cache
def recorded() -> dict[str, Any]:
    """What `python -m benchmarks.ladder` wrote."""
    return json.loads(FILE.read_text("utf-8"))


def rungs(
    model: str,
    arch: UNetArchitecture,
    parts: Mapping[str, Shapes],
    budget: int | None,
    options: str = "",
) -> Iterator[Rung]:
    """The ladder of a model of that U-Net; parts: shapes of its text encoders and VAE, by part.

    options: for the commands, what else makes up the model.
    """
    own = flops(arch, *_native(arch))
    named = shlex.quote(model) + options
    draw = f'koala generate "a lighthouse" --model {named}'
    draw += "" if budget is None else f" --vram {budget / GIB:g}"
    exact = "" if budget is None else " --weights fp16"  # else a plan may choose 8 bits

    def rung(
        way: str, time: str, loses: str, command: str,
        unet: UNetArchitecture = arch, quantised: str | None = None,
    ) -> Rung:  # fmt: skip
        sized = {**parts, UNET: tensor_shapes(unet)}
        found = _peak(unet, sized, quantised, budget)
        return Rung(
            way=way,
            time=time,
            disk=sum(weights(part, shapes)[0] for part, shapes in sized.items()),
            size=_native(arch)[:2],
            memory=None if found is None else found.bytes,
            mode=f"{found.place}, {found.decode} decode" if found else "",
            fits=None if budget is None or found is None else found.bytes <= budget,
            arithmetic=flops(unet, *_native(arch)) / own,
            loses=loses,
            command=command,
        )

    yield rung("as it is, fp16", "none", "nothing", f"{draw}{exact}")
    yield rung("8 bits", "none", loss("int8"), f"{draw} --weights int8", quantised="int8")
    yield rung("4 bits", "none", loss("int4"), f"{draw} --weights int4", quantised="int4")
    if not arch.inner:
        yield rung(
            f"pruned by {PRUNED:.0%}", "a drawing of each prompt on a CPU, and fitting",
            loss("pruned"),
            f"koala compress {named} --prune {PRUNED} --calibrate prompts.txt --out pruned",
            narrowed(arch, PRUNED),
        )  # fmt: skip
    for to, recipe in STUDENTS.items():
        try:
            student = student_of(arch, to)
        except UserError:  # this model cannot be its teacher
            continue
        if parameters(student) < parameters(arch):
            yield rung(
                f"{to if to in CUTS else f'depths {to}'}, distilled", _days(arch, recipe), loss(to),
                f"koala compress {named} --to {to} --out student", student,
            )  # fmt: skip


def narrowed(arch: UNetArchitecture, share: float) -> UNetArchitecture:
    """A U-Net with `share` fewer parameters, all its modules narrower inside by one factor.

    Pruning chooses what it narrows by what it sees; this has its size.
    """
    whole, possible, kept = parameters(arch), inner_widths(arch), 1.0
    while parameters(arch) > (1 - share) * whole:
        kept -= 1 / 64
        widths = {p: max(1, int(kept * i.width) // i.unit) * i.unit for p, i in possible.items()}
        narrower = {path: width for path, width in widths.items() if width < possible[path].width}
        arch = replace(arch, inner=tuple(narrower.items()), name="custom")
    return arch


_COMPONENTS = {TEXT: ("text_encoder", "text_encoder_2"), VAE: ("vae",)}


def _shapes(contents: Contents, components: tuple[str, ...]) -> Shapes:
    return {
        f"{component}.{name}": view.shape  # two encoders have tensors of one name
        for component in components
        for name, view in contents.tensors[component].items()
    }


def _native(arch: UNetArchitecture) -> tuple[int, int, int]:
    return arch.sample * FACTOR, arch.sample * FACTOR, arch.tokens


def _peak(
    unet: UNetArchitecture, parts: Mapping[str, Shapes], quantised: str | None, budget: int | None
) -> Peak | None:
    """The first mode within the budget, else the smallest; None for widths that are not SDXL's."""
    if (unet.widths, unet.context) != (get("sdxl").widths, get("sdxl").context):
        return None
    work = recorded()["work"]
    mine = {**work, "denoise": work["denoise"].get(unet.name, work["denoise"]["sdxl"])}
    modes = [peak(parts, mine, quantised, *mode) for mode in PLACES]
    least = min(modes, key=lambda mode: mode.bytes)
    return next((mode for mode in modes if budget is None or mode.bytes <= budget), least)


def loss(way: str) -> str:
    """What a way loses, in words; measured on the mini family."""
    found = recorded()["lost"].get(way)
    return UNKNOWN if found is None else f"R@5 {found['change']:+.1%} on {found['model']}"


def _days(arch: UNetArchitecture, recipe: str | None) -> str:
    days = recorded()["days"].get(recipe)
    if days is None or arch != get("sdxl"):
        return "training, not estimated"
    return ", ".join(f"{count:.0f} days of a {card}" for card, count in days.items())


def cells(rung: Rung) -> tuple[str, ...]:
    """A line of the ladder's table; the command comes last."""
    return (
        rung.way,
        rung.time,
        f"{rung.disk / 1e9:.2f}",
        memory_text(rung),
        f"{rung.arithmetic:.2f}",
        rung.loses,
        rung.command,
    )


def text(ladder: list[Rung], model: str, budget: int | None) -> str:
    """The ladder as a table, and what its columns are."""
    rows = [cells(rung) for rung in ladder]
    head = ("way", "time to make", "GB", "GiB", "arithmetic", "loses", "command")
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    width, height = ladder[0].size
    return "\n".join([f"{model}, {width}x{height} pixels", *lines, *_notes(ladder, budget)])


def _notes(ladder: list[Rung], budget: int | None) -> Iterator[str]:
    """What stands under the table."""
    yield "GB: all weights in fp16."
    if ladder[0].memory is None:
        yield "GiB: planned for U-Nets as wide as SDXL's only."
    else:
        within = "" if budget is None else f", within {budget / GIB:g} GiB if it can be"
        yield (
            f"GiB: planned for a GPU, {PLANNED} pixels{within}, beside CUDA's context; not "
            "measured."
        )
    yield "arithmetic: of a step, against the model's own; speed is not measured."
    if any("prompts.txt" in rung.command for rung in ladder):
        yield "prompts.txt: a file of yours with a prompt a line."
    if any("distilled" in rung.way for rung in ladder):
        yield "distilled: then, by koala distill RECIPE --student student; koala distill --help."


def memory_text(rung: Rung) -> str:
    if rung.memory is None:
        return "not planned"
    over = "" if rung.fits is not False else ", too much"
    return f"{rung.memory / GIB:.2f} ({rung.mode}{over})"
