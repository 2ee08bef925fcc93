"""The report as a Markdown page: tables, the sheet, and how the numbers were made."""

from __future__ import annotations

from koala.evaluation.statistics import LEVEL
from koala.evaluation.table import EvaluationReport


def report_page(report: EvaluationReport) -> str:
    """The whole page."""
    parts = ["# Evaluation"]
    if report.columns:
        parts += [report.table(), _cells(report)]
    if report.comparisons:
        parts += ["## What the differences are worth", report.verdicts(), _VERDICTS]
    for column, table in report.by_category():
        parts += [f"## {column.title}, by category of {column.prompts}", table]
    parts += ["## How it was measured", _method(report)]
    if report.judge:
        parts.append(_judge(report))
    parts.append("![the first prompts, one row for each model](sheet.png)")
    if report.columns:
        parts.append(_sources(report))
    parts += [f"Hardware: {report.hardware}", f"Command: `{report.command}`"]
    return "\n\n".join(parts) + "\n"


def _cells(report: EvaluationReport) -> str:
    text = (
        f"Brackets hold the {LEVEL:.0%} interval over other prompts of the kind, and over other "
        "trainings where a row has several. The arrow points to the better side."
    )
    if any(row.source for row in report.rows):
        text += (
            " Published lines were measured by others, with their settings and pictures: they are "
            "for orientation, and no verdict is given on them."
        )
    return text


_VERDICTS = f"""A line says whether its first model is better than its second, and the difference
with its {LEVEL:.0%} interval. Both drew the same prompts, so prompts are drawn again in pairs.
"Cannot be told" names how many prompts, or trainings of each, would tell a difference as large as
this one in four of five repetitions. Of twenty verdicts between equal models, one is wrong."""


def _method(report: EvaluationReport) -> str:
    settings = "; ".join(f"{name}: {value}" for name, value in report.settings.items())
    return (
        f"{settings}. Picture i of evaluation seed s has the seed (number of prompts) s + i for "
        "every model. Larger pictures are scaled down to the size named here. Distances depend on "
        "the number of pictures and on the real ones: compare them within this table only. Their "
        "intervals come from leaving out each of 20 groups of prompts in turn."
    )


def _judge(report: EvaluationReport) -> str:
    judge = report.judge
    return (
        "R@k is the share of images whose own prompt is among the k that a judge ranks highest of "
        f"all. The judge was trained on {judge['pictures']} real pictures of the training split "
        f"and no generated ones (seed {judge['seed']}, {judge['epochs']} epochs). FD-EffLite0 and "
        "the kernel distance are on EfficientNet-Lite0's features, which no training loss uses; "
        "they are neither FID nor KID. The prompts' own images are part of the reference, so the "
        "first row has the distances of as many other real images, of the training split."
    )


def _sources(report: EvaluationReport) -> str:
    metrics = "; ".join(f"{c.title.split()[0]}: {c.source}" for c in report.columns)
    lines = "; ".join(f"{row.name}: {row.source}" for row in report.rows if row.source)
    return f"Metrics: {metrics}." + (f"\n\nPublished lines: {lines}." if lines else "")
