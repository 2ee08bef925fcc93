"""From pictures to numbers: the scores of one prompt set, and what they add up to for every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from koala.data.illustrations.images import ImageSet
from koala.evaluation.drawing import files_of, folder_of
from koala.evaluation.metrics.bundled import Retrieval
from koala.evaluation.metrics.catalogue import MetricInfo
from koala.evaluation.metrics.metric import Distance, Metric, create
from koala.evaluation.models import REAL, Run, named
from koala.evaluation.pictures import RealPictures, at_size, stamp
from koala.evaluation.plan import Part, Plan
from koala.evaluation.prompts import Prompt
from koala.evaluation.published import published
from koala.evaluation.retrieval import Judge, Sentences, check_judge, load_judge, train_judge
from koala.evaluation.scoring import Pictures, ScoreFiles, score
from koala.evaluation.statistics import (
    Measured,
    compare,
    groups_of,
    interval,
    prompt_draws,
    pseudo_values,
)
from koala.evaluation.table import Cell, Column, Comparison, EvaluationRow
from koala.generation.image_files import open_image
from koala.utils.digest import digest

NOTHING = Prompt("", "")  # of a picture that is only compared with


@dataclass
class PartResult:
    """What one prompt set tells: columns, each row's cells, and comparisons."""

    columns: list[Column]
    cells: dict[str, dict[str, Cell]]  # row -> column's key -> cell
    comparisons: list[Comparison]
    judge: Judge | None


class Scores:
    """Pictures of one prompt set and their scores, computed once for metrics that share them."""

    def __init__(
        self, plan: Plan, part: Part, device: torch.device, first: bool, extractor: nn.Module | None
    ) -> None:
        self.plan, self.part, self.device, self.first = plan, part, device, first
        self.extractor = extractor
        self.files: dict[str, ScoreFiles] = {}
        self.runs = {run.name: self._of_run(run) for row in plan.rows for run in row.runs}

    def _of_run(self, run: Run) -> Pictures:
        """A run's pictures, seed by seed."""
        files = files_of(self.plan, self.part, run)
        prompts = self.part.prompts.prompts * len(self.part.seeds)
        if run.pictures is not None:
            told = stamp(files)
        else:
            told = (folder_of(self.plan, self.part, run) / "settings.json").read_text("utf-8")
            told = digest([told, self.part.seeds])
        size = self.plan.size
        return Pictures(
            run.name, lambda i: at_size(open_image(files[i]), size), prompts, digest([told, size])
        )

    def of_real(self, which: Sequence[int], prompts: Sequence[Prompt] | None = None) -> Pictures:
        """Real pictures, at the size of the drawn ones."""
        real = self.part.real
        assert real is not None
        indices, size = list(which), self.plan.size
        return Pictures(
            REAL,
            lambda i: at_size(real.image(indices[i]), size),
            prompts or [NOTHING] * len(indices),
            digest([real.digest, indices, size]),
        )

    def compute(self, metrics: Sequence[Metric]) -> None:
        """Scores all pictures, once for the metrics of one `info.scores`."""
        every = [*self.runs.values()]
        if (real := self.part.real) is not None:
            every += self._real(real, metrics)
        metric = metrics[0]
        if self.extractor is not None and metric.info.scores == "efflite0":
            metric.extractor = self.extractor  # type: ignore[attr-defined]  # bundled's
        weights = self.plan.weights
        self.files[metric.info.scores] = score(
            metric, every, self.plan.out, weights, self.device, self.first
        )

    def _real(self, real: RealPictures, metrics: Sequence[Metric]) -> Iterator[Pictures]:
        if any(isinstance(metric, Distance) for metric in metrics):
            yield self.of_real(real.reference)
            if real.others:
                yield self.of_real(real.others)
        if any(not isinstance(metric, Distance) for metric in metrics) and real.own:
            yield self.own(real)
        if any(isinstance(metric, Retrieval) for metric in metrics) and self.trains:
            yield self.of_real(self.part.train)

    def own(self, real: RealPictures) -> Pictures:
        return self.of_real(real.own, self.part.prompts.prompts)

    @property
    def trains(self) -> bool:
        """Whether a judge is trained on the illustrations."""
        return self.plan.judge is None and bool(self.part.train)

    def read(self, info: MetricInfo, pictures: Pictures) -> Tensor:
        return self.files[info.scores].read(pictures)


def measure(
    plan: Plan,
    part: Part,
    device: torch.device,
    first: bool,
    extractor: nn.Module | None,
    sentences: Sentences | None,
) -> PartResult | None:
    """All metrics of one prompt set; None in other processes than the first."""
    metrics = [create(info) for info in part.metrics]
    scores = Scores(plan, part, device, first, extractor)
    for name in dict.fromkeys(info.scores for info in part.metrics):
        scores.compute([metric for metric in metrics if metric.info.scores == name])
    if not first:
        return None
    judge = _judge(scores, metrics, sentences)
    columns: list[Column] = []
    cells: dict[str, dict[str, Cell]] = {name: {} for name in (REAL, *(r.name for r in plan.rows))}
    comparisons: list[Comparison] = []
    for metric in metrics:
        column = _column(part, metric.info)
        columns.append(column)
        measured = {row.name: _measured(scores, metric, row.runs) for row in plan.rows}
        for name, cell in _cells(part, metric, measured).items():
            cells[name][column.key] = cell
        alone = {name: row for name, (row, _) in measured.items()}
        comparisons += _comparisons(part, metric, column, alone)
        if (real := _real_value(scores, metric)) is not None:
            cells[REAL][column.key] = Cell(real)
    return PartResult(columns, cells, comparisons, judge)


def _column(part: Part, info: MetricInfo) -> Column:
    return Column(
        part.prompts.name,
        info.name,
        info.column,
        info.higher,
        info.factor,
        info.digits,
        info.source,
    )


def _judge(scores: Scores, metrics: Sequence[Metric], sentences: Sentences | None) -> Judge | None:
    """Gives every `Retrieval` its judge and the prompts' features."""
    asking = [metric for metric in metrics if isinstance(metric, Retrieval)]
    if not asking:
        return None
    if sentences is None:
        from koala.mini.sentence_encoder import SentenceEncoder

        sentences = SentenceEncoder()
    plan, part = scores.plan, scores.part
    texts = sentences([prompt.text for prompt in part.prompts.prompts]).float().cpu()
    if plan.judge is not None:
        judge = load_judge(plan.judge, plan.size)
    else:
        assert plan.images is not None
        images = ImageSet(plan.images)
        seen = scores.read(asking[0].info, scores.of_real(part.train))
        judge = train_judge([images.rows[i] for i in part.train], seen, sentences, plan.size)
    drawn = scores.read(asking[0].info, scores.runs[plan.rows[0].runs[0].name])
    check_judge(judge, drawn, texts)
    for metric in asking:
        metric.judge, metric.texts = judge, texts
    return judge


def _measured(
    scores: Scores, metric: Metric, runs: Sequence[Run]
) -> tuple[Measured, list[list[float]]]:
    """A row's metric, and each training's value for each evaluation seed."""
    part = scores.part
    totals, units, by_seed = [], [], []
    for run in runs:
        every = scores.read(metric.info, scores.runs[run.name])
        of_seeds = every.split(len(part.prompts.prompts))
        if isinstance(metric, Distance):
            values, prompts = _distance(scores, metric, of_seeds)
        else:
            rows = [metric.values(one, part.prompts.prompts).double().numpy() for one in of_seeds]
            values, prompts = [_mean(part, row) for row in rows], np.mean(rows, axis=0)
        totals.append(float(np.mean(values)))
        units.append(prompts)
        by_seed.append(values)
    return Measured(np.array(totals), np.stack(units)), by_seed


def _mean(part: Part, values: np.ndarray) -> float:
    """The mean over prompts, or over the categories' means."""
    return float(np.mean([values[where].mean() for where in _groups(part)]))


def _groups(part: Part) -> list[np.ndarray]:
    strata = part.strata
    if strata is None:
        return [np.arange(len(part.prompts.prompts))]
    return [np.flatnonzero(np.array(strata) == kind) for kind in np.unique(strata)]


def _distance(
    scores: Scores, metric: Distance, of_seeds: Sequence[Tensor]
) -> tuple[list[float], np.ndarray]:
    """The distance for each seed, and the pseudo-values of groups of prompts, over the seeds."""
    assert scores.part.real is not None
    reference = scores.read(metric.info, scores.of_real(scores.part.real.reference))
    groups = groups_of(len(scores.part.prompts.prompts))
    values = [metric.distance(one, reference) for one in of_seeds]
    pseudo = [
        pseudo_values(value, metric.left_out(one, reference, groups))
        for value, one in zip(values, of_seeds, strict=True)
    ]
    return values, np.mean(pseudo, axis=0)


def _real_value(scores: Scores, metric: Metric) -> float | None:
    """The metric of real pictures, where there are some that stand for it."""
    real = scores.part.real
    if real is None:
        return None
    if isinstance(metric, Distance):
        if not real.others:
            return None
        reference = scores.read(metric.info, scores.of_real(real.reference))
        return metric.distance(scores.read(metric.info, scores.of_real(real.others)), reference)
    if not real.own:
        return None
    own = scores.read(metric.info, scores.own(real))
    values = metric.values(own, scores.part.prompts.prompts)
    return _mean(scores.part, values.double().numpy())


def _cells(
    part: Part,
    metric: Metric,
    measured: Mapping[str, tuple[Measured, list[list[float]]]],
) -> dict[str, Cell]:
    draws = _draws(part, metric, [row.of_prompts for row, _ in measured.values()])
    cells = {}
    for (name, (row, by_seed)), drawn in zip(measured.items(), draws, strict=True):
        found = interval(row.value, drawn, [(row.training_error, len(row.totals))])
        categories = {}
        if part.prompts.categories and not isinstance(metric, Distance):
            of = np.array([prompt.category for prompt in part.prompts.prompts])
            means = row.of_prompts
            categories = {c: float(means[of == c].mean()) for c in part.prompts.categories}
        cells[name] = Cell(found.value, found.low, found.high, by_seed, categories)
    return cells


def _draws(part: Part, metric: Metric, units: Sequence[np.ndarray]) -> np.ndarray:
    """`prompt_draws`, within categories where the metric is the mean over them."""
    return prompt_draws(units, None if isinstance(metric, Distance) else part.strata)


def _comparisons(
    part: Part, metric: Metric, column: Column, measured: Mapping[str, Measured]
) -> list[Comparison]:
    pairs = list(combinations(measured, 2))
    if not pairs:
        return []
    apart = [measured[a].of_prompts - measured[b].of_prompts for a, b in pairs]
    draws = _draws(part, metric, apart)
    n, higher = len(part.prompts.prompts), metric.info.higher
    return [
        Comparison(a, b, column.key, compare(measured[a], measured[b], drawn, n, higher))
        for (a, b), drawn in zip(pairs, draws, strict=True)
    ]


def published_rows(columns: Sequence[Column], parts: Sequence[Part]) -> list[EvaluationRow]:
    """The published lines of these columns, each marked as such."""
    found: dict[str, EvaluationRow] = {}
    categories = {part.prompts.name: part.prompts.categories for part in parts}
    for column in columns:
        for line in published(column.prompts, column.metric):
            names = categories[column.prompts]
            by_name = dict(zip(names, line.categories, strict=True)) if names else {}
            cell = Cell(line.value, categories=by_name)
            row = found.setdefault(line.name, EvaluationRow(line.name, "", {}, source=line.source))
            found[line.name] = replace(row, cells={**row.cells, column.key: cell})
    return [*found.values()]


def sheet_pictures(
    plan: Plan, part: Part, columns: int
) -> tuple[dict[str, list[Image.Image]], list[str]]:
    """The first pictures of every row, real ones first, and their prompts."""
    prompts = part.prompts.prompts[:columns]
    rows: dict[str, list[Image.Image]] = {}
    if part.real is not None and part.real.own:
        rows[REAL] = [at_size(part.real.image(i), plan.size) for i in part.real.own[:columns]]
    for row in plan.rows:
        files = files_of(plan, part, row.runs[0])[: len(prompts)]
        rows[row.name] = [at_size(open_image(file), plan.size) for file in files]
    return rows, [prompt.text for prompt in prompts]


def settings_of(plan: Plan) -> dict[str, object]:
    """What the report says of how it was made."""
    found: dict[str, object] = {}
    for part in plan.parts:
        own: dict[str, object] = {"prompts": len(part.prompts.prompts), "seeds": list(part.seeds)}
        if part.real is not None:
            own["reference pictures"] = len(part.real.reference)
        found |= own if len(plan.parts) == 1 else {part.prompts.name: own}
    for name, values in (("steps", plan.steps), ("guidance", plan.guidance)):
        found[name] = next(iter(values.values())) if len({*values.values()}) == 1 else dict(values)
    return found | {"size": named(plan.size)}
