"""Evaluates models: draws, scores, compares, and writes the report.

All rows are drawn from the same prompts with the same noise. `koala.evaluation.plan` checks what is
asked for, `drawing` and `scoring` do the work and keep it, `measuring` adds it up.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from koala.evaluation.drawing import draw
from koala.evaluation.measuring import (
    PartResult,
    measure,
    published_rows,
    settings_of,
    sheet_pictures,
)
from koala.evaluation.models import REAL, Named
from koala.evaluation.plan import Plan, plan
from koala.evaluation.prompts import write
from koala.evaluation.report_page import report_page
from koala.evaluation.retrieval import Sentences
from koala.evaluation.table import EvaluationReport, EvaluationRow
from koala.utils.atomic import new_file, write_text
from koala.utils.contact_sheet import image_grid
from koala.utils.device import hardware, pick_device

SHEET_COLUMNS = 12


def evaluate(
    models: Sequence[str] | Mapping[str, str | Path | Sequence[str | Path]],
    out: str | Path,
    prompts: Sequence[str] = (),
    pictures: str | Path | None = None,
    *,
    metrics: Sequence[str] = (),
    count: int | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | None = None,
    weights: Mapping[str, str | Path] | None = None,
    judge: str | Path | None = None,
    device: str | None = None,
    notes: Mapping[str, str] | None = None,
    extractor: nn.Module | None = None,
    sentences: Sentences | None = None,
) -> EvaluationReport | None:
    """Draws prompts with models, measures the pictures, and writes a report.

    The same call goes on where a killed one stopped. Under torchrun the processes share the work.

    models: name in the report -> what `koala.load` takes, a folder of pictures, or several of
        these, the trainings of one row; or the command line's MODEL and NAME=RUN,RUN.
    out: folder for report.json, report.md, sheet.png, and what was drawn and scored.
    prompts: see `koala.evaluation.prompt_sets.read_prompts`.
    pictures: a folder of real pictures to compare with, or the illustrations of `koala prepare`,
        which bring their own prompts.
    metrics: keys of `koala.evaluation.metrics.catalogue.METRICS`; by default those that the prompt
        set's authors report, and for the illustrations those that need no download.
    count: so many prompts of each set; by default all, 200 of the illustrations.
    seeds: evaluation seeds, from 0; by default as many as the set's authors draw, three of the
        illustrations.
    steps, guidance: of sampling. size: WIDTHxHEIGHT. All by default the models' own.
    weights: name in `koala.evaluation.metrics.weights.WEIGHTS` -> folder, file or Hub id.
    judge: judge.safetensors of an earlier report; None trains one on the illustrations.
    notes: name in the report -> a note, such as the samples seen.
    extractor, sentences: in place of EfficientNet-Lite0, uint8 [n, 3, h, w] -> [n, d], and of
        MiniLM, n texts -> [n, d] of length 1.

    Returns None in other processes than the first. UserError for what cannot be evaluated.
    """
    rows: Sequence[str | Named]
    if isinstance(models, Mapping):
        rows = [(name, _places(place)) for name, place in models.items()]
    else:
        rows = models
    asked = plan(
        rows, out, prompts, pictures,
        metrics=metrics, count=count, seeds=seeds,
        steps=[] if steps is None else [str(steps)],
        guidance=[] if guidance is None else [str(guidance)],
        size=size, weights=[f"{name}={path}" for name, path in (weights or {}).items()],
        judge=judge, device=device, notes=notes,
    )  # fmt: skip
    return run(asked, extractor, sentences)


def _places(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(given)] if isinstance(given, str | Path) else [*map(str, given)]


def run(
    plan: Plan, extractor: nn.Module | None = None, sentences: Sentences | None = None
) -> EvaluationReport | None:
    """Carries out a plan; arguments and result as of `evaluate`."""
    first = os.environ.get("RANK", "0") == "0"
    device = _device(plan.device)
    if first:
        for part in plan.parts:
            file = plan.out / "drawn" / part.prompts.name / "prompts.jsonl"
            write_text(file, write(part.prompts.prompts))
    for row in plan.rows:
        for one in row.runs:
            draw(plan, row.name, one, device, first)
            gc.collect()  # one model in memory at a time
    results = [
        measure(plan, part, torch.device(pick_device(device)), first, extractor, sentences)
        for part in plan.parts
    ]
    if not first:
        return None
    report = _report(plan, [result for result in results if result is not None])
    _write(plan, report, [result for result in results if result is not None])
    return report


def _device(asked: str | None) -> str | None:
    """The device that is asked for; under torchrun each process has its own GPU."""
    if asked is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return asked


def _report(plan: Plan, results: Sequence[PartResult]) -> EvaluationReport:
    columns = [column for result in results for column in result.columns]
    rows = []
    for name in (REAL, *(row.name for row in plan.rows)):
        cells = {key: cell for result in results for key, cell in result.cells[name].items()}
        trainings = next((len(row.runs) for row in plan.rows if row.name == name), 1)
        if cells:
            rows.append(EvaluationRow(name, plan.notes.get(name, ""), cells, trainings))
    judge = next((result.judge for result in results if result.judge is not None), None)
    return EvaluationReport(
        rows=[*rows, *published_rows(columns, plan.parts)],
        columns=columns,
        comparisons=[c for result in results for c in result.comparisons],
        settings=settings_of(plan),
        judge=judge.about if judge else {},
        hardware=hardware(),
        command=_command(),
        prompts={part.prompts.name: [p.text for p in part.prompts.prompts] for part in plan.parts},
    )


def _command() -> str:
    """What was typed; `python -m koala` is `koala`."""
    name = Path(sys.argv[0]).name.replace("__main__.py", "koala")
    return shlex.join([name, *sys.argv[1:]])


def _write(plan: Plan, report: EvaluationReport, results: Sequence[PartResult]) -> None:
    """Writes each file atomically; the page, which shows the others, comes last."""
    for result in results:
        if result.judge is not None:
            result.judge.save(plan.out / "judge.safetensors")
    sheet = image_grid(*sheet_pictures(plan, plan.parts[0], SHEET_COLUMNS))
    with new_file(plan.out / "sheet.png") as part:
        sheet.save(part, "PNG", optimize=True)
    text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n"
    write_text(plan.out / "report.json", text)
    write_text(plan.out / "report.md", report_page(report))
