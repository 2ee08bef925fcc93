"""Writes a report's results into the model cards."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from koala.checkpoints import model_card
from koala.errors import UserError
from koala.evaluation.table import EvaluationReport


def check_cards(models: Mapping[str, str | Path]) -> None:
    """UserError unless every model is a folder with a model card that koala wrote."""
    for model in models.values():
        folder = Path(model)
        if not (folder / model_card.FILE).is_file() or not model_card.read(folder).ours:
            raise UserError(
                f"--card: {model} is not a folder with a koala model card; leave --card out, or "
                "evaluate a model that `koala compress` or `koala distill` wrote"
            )


def enter(report: EvaluationReport, models: Mapping[str, str | Path]) -> None:
    """Writes each model's row and the real images' into its model card.

    models: name in the report -> folder, as given to `evaluate`.
    """
    real, *rows = report.rows
    for row in rows:
        folder = Path(models[row.name])
        table = replace(report, rows=[real, row]).table()
        evaluated = model_card.Evaluated(table, report.settings, report.hardware)
        replace(model_card.read(folder), evaluated=evaluated).write(folder)
