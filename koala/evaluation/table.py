"""The evaluation report: its data, its Markdown table and its page."""

from dataclasses import asdict, dataclass, field
from statistics import mean, stdev

from koala.utils import markdown


@dataclass(frozen=True)
class EvaluationRow:
    """The metrics of one model: metric -> one value for each evaluation seed."""

    name: str
    note: str
    values: dict[str, list[float]]

    @staticmethod
    def of(name: str, note: str, by_seed: list[dict[str, float]]) -> "EvaluationRow":
        """Builds a row from the metrics of each seed."""
        values = {metric: [metrics[metric] for metrics in by_seed] for metric in by_seed[0]}
        return EvaluationRow(name, note, values)

    def mean(self, metric: str) -> float:
        return mean(self.values[metric])

    def cell(self, metric: str, digits: int, factor: float = 1) -> str:
        """Mean ± standard deviation (min to max); the bare value for a single seed."""
        values = [value * factor for value in self.values[metric]]
        if len(values) == 1:
            return f"{values[0]:.{digits}f}"
        low, high = min(values), max(values)
        spread = f"{stdev(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
        return f"{mean(values):.{digits}f} ± {spread}"


@dataclass(frozen=True)
class EvaluationReport:
    """The rows, real pictures first, with the settings and hardware they come from."""

    rows: list[EvaluationRow]
    settings: dict[str, object]
    judge: dict[str, str]
    hardware: str
    command: str
    prompts: list[str] = field(repr=False)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def table(self) -> str:
        """The rows as a Markdown table."""
        header = ["", "FD-EffLite0 ↓", "kernel distance x1000 ↓", "R@1 ↑", "R@5 ↑", "R@10 ↑"]
        real = self.rows[0].mean("R@5")
        cells = (
            [
                f"{row.name} ({row.note})" if row.note else row.name,
                row.cell("FD-EffLite0", 2),
                row.cell("kernel distance", 2, 1000),
                *(row.cell(rank, 3) for rank in ("R@1", "R@5", "R@10")),
                f"{row.mean('R@5') / real:.2f}" if real else "-",
            ]
            for row in self.rows
        )
        return markdown.table([*header, "R@5 of real"], cells)

    def markdown(self) -> str:
        """The report as a Markdown page: table, sheet and method."""
        s = self.settings
        return f"""# Evaluation

{self.table()}

Cells are mean ± standard deviation (min to max) over the evaluation seeds {s["seeds"]}; real
images have no seed. The {s["prompts"]} prompts are captions of held-out (concept, style) pairs;
training contained each concept and each style, but not the pair. Images have {s["size"]} pixels,
{s["steps"]} steps and guidance {s["guidance"]}; larger real images are scaled down. Image i of
evaluation seed s has seed {s["prompts"]} s + i for every model.

Distances are to {s["reference pictures"]} held-out real pictures (pairs and whole concepts), in
EfficientNet-Lite0 features, which no training loss uses. Compare them within this table only:
FD-EffLite0 is not FID and depends on the number of images. The kernel distance is the unbiased
estimate of KID. The prompts' own images are part of the reference, so the first row has the
distances of {s["prompts"]} other real images, of the training split.

R@k is the share of images whose own prompt is among the k that the judge ranks highest of all
{s["prompts"]}. The judge was trained on {self.judge["pictures"]} real pictures of the training
split and no generated ones (seed {self.judge["seed"]}, {self.judge["epochs"]} epochs).

![one row for each model](sheet.png)

Hardware: {self.hardware}

Command: `{self.command}`
"""
