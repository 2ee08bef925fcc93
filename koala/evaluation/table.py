"""The evaluation report: its data and its Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from koala.evaluation.statistics import Verdict
from koala.utils import markdown


@dataclass(frozen=True)
class Column:
    """A metric on a prompt set. higher: is better. factor, digits: of the values in tables."""

    prompts: str
    metric: str
    title: str
    higher: bool
    factor: float
    digits: int
    source: str

    @property
    def key(self) -> str:
        return f"{self.prompts} {self.metric}"

    def shown(self, value: float, sign: bool = False) -> str:
        return f"{value * self.factor:{'+' if sign else ''}.{self.digits}f}"


@dataclass(frozen=True)
class Cell:
    """One metric of one row. low, high: of the 95 % interval; None where nothing varies.

    by_seed: each training's value for each evaluation seed. categories: by category, where the
    prompts have some.
    """

    value: float
    low: float | None = None
    high: float | None = None
    by_seed: list[list[float]] = field(default_factory=list)
    categories: dict[str, float] = field(default_factory=dict)

    def text(self, column: Column) -> str:
        if self.low is None or self.high is None:
            return column.shown(self.value)
        bounds = f"{column.shown(self.low)}, {column.shown(self.high)}"
        return f"{column.shown(self.value)} [{bounds}]"


@dataclass(frozen=True)
class EvaluationRow:
    """The metrics of one line: by `Column.key`. source: of a published line, which others made."""

    name: str
    note: str
    cells: dict[str, Cell]
    trainings: int = 1
    source: str = ""

    @property
    def label(self) -> str:
        notes = [
            self.note,
            f"{self.trainings} trainings" if self.trainings > 1 else "",
            "published" if self.source else "",
        ]
        told = ", ".join(note for note in notes if note)
        return f"{self.name} ({told})" if told else self.name


@dataclass(frozen=True)
class Comparison:
    """Whether the first row is better than the second, by one metric."""

    first: str
    second: str
    column: str  # its key
    verdict: Verdict

    def text(self, column: Column) -> str:
        d = self.verdict.difference
        bounds = f"[{column.shown(d.low, True)}, {column.shown(d.high, True)}]"
        return f"**{self.verdict.text}** {column.shown(d.value, True)} {bounds}"


@dataclass(frozen=True)
class EvaluationReport:
    """The rows, real pictures first where there are any, with what they come from."""

    rows: list[EvaluationRow]
    columns: list[Column]
    comparisons: list[Comparison]
    settings: dict[str, object]
    judge: dict[str, str]
    hardware: str
    command: str
    prompts: dict[str, list[str]] = field(repr=False, default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        found = asdict(self)
        for one, comparison in zip(found["comparisons"], self.comparisons, strict=True):
            one["text"] = comparison.verdict.text
        return found

    def only(self, names: Sequence[str]) -> EvaluationReport:
        """The report with these rows alone, in their order here."""
        rows = [row for row in self.rows if row.name in names]
        return replace(self, rows=rows, comparisons=[])

    def table(self) -> str:
        """The rows as a Markdown table."""
        several = len({column.prompts for column in self.columns}) > 1
        header = [f"{c.title} ({c.prompts})" if several else c.title for c in self.columns]
        cells = ([row.label, *self._row(row)] for row in self.rows)
        unit = ["R@5 of real"] if self._unit() else []
        return markdown.table(["", *header, *unit], cells)

    def _row(self, row: EvaluationRow) -> list[str]:
        """The cells of a row; empty where it was not measured."""
        cells = [row.cells[c.key].text(c) if c.key in row.cells else "" for c in self.columns]
        if unit := self._unit():
            key, real = unit
            cells.append(f"{row.cells[key].value / real:.2f}" if key in row.cells else "")
        return cells

    def _unit(self) -> tuple[str, float] | None:
        """The key of R@5 and the real pictures', if they have one."""
        keys = [column.key for column in self.columns if column.metric == "r@5"]
        real = self.rows[0].cells.get(keys[0]) if keys and self.rows else None
        return (keys[0], real.value) if real and real.low is None and real.value else None

    def verdicts(self) -> str:
        """Which rows are better than which, as a Markdown table."""
        pairs = dict.fromkeys((c.first, c.second) for c in self.comparisons)
        by_key = {(c.first, c.second, c.column): c for c in self.comparisons}
        cells = (
            [
                f"{first} against {second}",
                *(
                    by_key[first, second, column.key].text(column)
                    if (first, second, column.key) in by_key
                    else ""
                    for column in self.columns
                ),
            ]
            for first, second in pairs
        )
        return markdown.table(["", *(column.title for column in self.columns)], cells)

    def by_category(self) -> list[tuple[Column, str]]:
        """A Markdown table of each metric whose prompts have categories."""
        found = []
        for column in self.columns:
            rows = [row for row in self.rows if row.cells.get(column.key, Cell(0)).categories]
            if not rows:
                continue
            names = [*rows[0].cells[column.key].categories]
            cells = (
                [
                    row.label,
                    *(column.shown(cell.categories[name]) for name in names),
                    column.shown(cell.value),
                ]
                for row in rows
                for cell in [row.cells[column.key]]
            )
            found.append((column, markdown.table(["", *names, "in all"], cells)))
        return found
