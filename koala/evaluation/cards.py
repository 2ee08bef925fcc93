"""What a report says of a model, entered in the model's own card."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from koala.checkpoints import model_card
from koala.errors import UserError
from koala.evaluation.table import Report


def check_cards(models: Mapping[str, str | Path]) -> None:
    """Raises UserError unless every model is a folder with a card that koala wrote."""
    for model in models.values():
        folder = Path(model)
        if not (folder / model_card.FILE).is_file() or not model_card.read(folder).ours:
            raise UserError(
                f"--card: {model} is no folder with a model card of koala's; leave --card out, or "
                "evaluate what `koala compress` or `koala distill` wrote"
            )


def enter(report: Report, models: Mapping[str, str | Path]) -> None:
    """Writes each model's row, beside the real pictures', into README.md of its folder.

    models: name in the report -> folder, as given to `evaluate`.
    """
    real, *rows = report.rows
    for row in rows:
        folder = Path(models[row.name])
        table = replace(report, rows=[real, row]).table()
        evaluated = model_card.Evaluated(table, report.settings, report.hardware)
        replace(model_card.read(folder), evaluated=evaluated).write(folder)
