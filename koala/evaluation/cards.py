"""Writes a report's results into the model cards."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from koala.checkpoints import card_facts, model_card
from koala.errors import UserError
from koala.evaluation.models import REAL, Row
from koala.evaluation.table import EvaluationReport


def folders_with_cards(rows: list[Row]) -> dict[str, Path]:
    """The folder of every row. UserError unless each is one model with a card that koala wrote."""
    folders = {}
    for row in rows:
        folder = Path(row.runs[0].model)
        whole = len(row.runs) == 1 and (folder / model_card.FILE).is_file()
        if not whole or not model_card.read(folder).ours:
            raise UserError(
                f"--card: {','.join(run.model for run in row.runs)} is not a folder with a koala "
                "model card; leave --card out, or evaluate a model that `koala compress` or "
                "`koala distill` wrote"
            )
        folders[row.name] = folder
    return folders


def enter(report: EvaluationReport, folders: Mapping[str, Path]) -> None:
    """Writes each model's row and the real images' into its model card."""
    for name, folder in folders.items():
        table = report.only([REAL, name]).table()
        evaluated = card_facts.Evaluated(table, report.settings, report.hardware)
        model_card.write(replace(model_card.read(folder), evaluated=evaluated), folder)
