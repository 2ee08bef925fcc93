"""What a report holds and how it reads: rows of measurements, as a Markdown table and page."""

from dataclasses import asdict, dataclass, field
from statistics import mean, stdev


@dataclass(frozen=True)
class Row:
    """One model's measurements, a list of one value for each evaluation seed."""

    name: str
    note: str
    values: dict[str, list[float]]

    @staticmethod
    def of(name: str, note: str, by_seed: list[dict[str, float]]) -> "Row":
        """A row of the measures of each seed."""
        values = {metric: [measured[metric] for measured in by_seed] for metric in by_seed[0]}
        return Row(name, note, values)

    def mean(self, metric: str) -> float:
        return mean(self.values[metric])

    def cell(self, metric: str, digits: int, factor: float = 1) -> str:
        """Mean, standard deviation, least and greatest; the value alone where there is but one."""
        values = [value * factor for value in self.values[metric]]
        if len(values) == 1:
            return f"{values[0]:.{digits}f}"
        low, high = min(values), max(values)
        spread = f"{stdev(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
        return f"{mean(values):.{digits}f} ± {spread}"


@dataclass(frozen=True)
class Report:
    """What was measured (`rows`, the real pictures first), how (`settings`) and on what."""

    rows: list[Row]
    settings: dict[str, object]
    judge: dict[str, str]
    hardware: str
    command: str
    prompts: list[str] = field(repr=False)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def table(self) -> str:
        """The rows as a Markdown table."""
        head = (
            "| | FD-EffLite0 ↓ | kernel distance x1000 ↓ | R@1 ↑ | R@5 ↑ | R@10 ↑ | R@5 of real |"
        )
        lines = [head, "|---|---|---|---|---|---|---|"]
        real = self.rows[0].mean("R@5")
        for row in self.rows:
            cells = [
                f"{row.name} ({row.note})" if row.note else row.name,
                row.cell("FD-EffLite0", 2),
                row.cell("kernel distance", 2, 1000),
                *(row.cell(rank, 3) for rank in ("R@1", "R@5", "R@10")),
                f"{row.mean('R@5') / real:.2f}" if real else "-",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def markdown(self) -> str:
        """The whole report as Markdown: table, sheet, and how it was made."""
        s = self.settings
        return f"""# Evaluation

{self.table()}

A cell is mean ± standard deviation (least to greatest) over the evaluation seeds {s["seeds"]}; real
pictures need no seed. {s["prompts"]} prompts, captions of held-out (concept, style) pairs whose
halves were both seen in training; {s["steps"]} steps, guidance {s["guidance"]}; pictures of
{s["size"]} pixels, real ones brought down to it. Picture i of evaluation seed s is drawn with seed
{s["prompts"]} s + i, the same for every model.

Distances are to {s["reference pictures"]} held-out real pictures (pairs and whole concepts), on
EfficientNet-Lite0 features, which no training loss uses. They compare only within this table:
FD-EffLite0 is no FID, and it depends on the number of pictures. The kernel distance is the unbiased
one of KID. The prompts' own pictures are part of the reference, so the distances in the first row
are those of {s["prompts"]} other real pictures, of the training split.

R@k: the share of pictures whose own prompt is among the k that the judge ranks first of all
{s["prompts"]}. The judge was trained on {self.judge["pictures"]} real pictures of the training
split and on no drawn one (seed {self.judge["seed"]}, {self.judge["epochs"]} epochs).

![one row a model](sheet.png)

Hardware: {self.hardware}

Command: `{self.command}`
"""
