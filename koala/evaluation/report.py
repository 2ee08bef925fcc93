"""Evaluates models: distances and retrieval, as a table and a contact sheet.

All models generate the same prompts with the same noise. The prompts are captions of held-out real
images whose concept and style both occur in training, but never together. The first row is those
real images, an upper bound for the models.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from koala.data.illustrations.images import ImageSet
from koala.errors import UserError
from koala.evaluation.distances import frechet, kernel_distance
from koala.evaluation.features import EffLite0, at_size, extract
from koala.evaluation.judge import Judge
from koala.evaluation.models import REAL, check, named
from koala.evaluation.table import EvaluationReport, EvaluationRow
from koala.generation import Pipeline, load
from koala.mini.sentence_encoder import SentenceEncoder
from koala.utils.atomic import new_file
from koala.utils.contact_sheet import image_grid
from koala.utils.device import hardware
from koala.utils.progress import progress

KIND = "emoji"
JUDGE_IMAGES = 4000  # at most: features take about three minutes on two cores
SHEET_COLUMNS = 12
CHUNK = 32  # prompts between updates of the progress bar
KERNEL_SUBSET = 100

Sentences = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Sampling:
    """What every model generates: all of `texts` for each of `seeds`."""

    texts: list[str]
    seeds: list[int]
    steps: int
    guidance: float


@dataclass(frozen=True)
class Evaluator:
    """Computes all metrics, from the features of the real images.

    held_out [m, d]: the reference of the distances. own [n, d]: the prompts' real images, part of
    the reference. others [n, d]: real images of the training split. texts [n, d_t]: the prompts.
    """

    held_out: Tensor
    own: Tensor
    others: Tensor
    texts: Tensor
    judge: Judge

    def measure(self, features: Tensor) -> dict[str, float]:
        """The metrics of images generated for the prompts, features [n, d]."""
        return self._distances(features) | self.judge.retrieval(features, self.texts)

    def real(self) -> dict[str, float]:
        """The metrics of real pictures: distances of `others`, retrieval of `own`."""
        return self._distances(self.others) | self.judge.retrieval(self.own, self.texts)

    def _distances(self, features: Tensor) -> dict[str, float]:
        size = min(KERNEL_SUBSET, len(features), len(self.held_out))
        generator = torch.Generator().manual_seed(0)  # the same subsets for every row
        return {
            "FD-EffLite0": frechet(features, self.held_out),
            "kernel distance": kernel_distance(features, self.held_out, generator, size=size),
        }


def evaluate(
    models: Mapping[str, str | Path],
    images: str | Path,
    out: str | Path,
    prompts: int = 200,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 10,
    guidance: float = 3.5,
    notes: Mapping[str, str] | None = None,
    judge: str | Path | None = None,
    extractor: nn.Module | None = None,
    sentences: Sentences | None = None,
) -> EvaluationReport:
    """Measures models against held-out real images and writes a report.

    Args:
        models: name in the report -> folder or bundled model.
        images: folder of prepared images with the splits train, test-pair and test-concept.
        out: folder for report.json, report.md, sheet.png and judge.safetensors.
        prompts: number of held-out pairs, chosen by the hash of their id.
        seeds: evaluation seeds, from 0.
        steps, guidance: of sampling.
        notes: name in the report -> a note, such as the samples seen.
        judge: judge.safetensors of an earlier report on the same images; None trains one.
        extractor: image features, uint8 [n, 3, h, w] -> [n, d]; None for EfficientNet-Lite0.
        sentences: text features, n texts -> [n, d_t] of length 1; None for MiniLM.

    Raises:
        UserError: an unknown model, too few images, a read-only folder, a missing package.
    """
    size = check(models, images, prompts, seeds, steps, guidance, judge)
    notes = dict(notes or {})
    if unknown := set(notes) - {REAL, *models}:
        raise UserError(f"notes on {sorted(unknown)}: allowed are {[REAL, *models]}")
    real = ImageSet(images)
    chosen, reference, train = choose(real, prompts)
    texts = [real.rows[i]["short"] for i in chosen]
    out = _writable(Path(out))
    trained = _loaded(Path(judge), size) if judge else None
    extractor = extractor or EffLite0().to("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = build_evaluator(
        real, chosen, reference, train, size, extractor, sentences or SentenceEncoder(), trained
    )
    rows = [EvaluationRow.of(REAL, notes.get(REAL, ""), [evaluator.real()])]
    sheet = {REAL: [at_size(real.image(i), size) for i in chosen[:SHEET_COLUMNS]]}
    sampling = Sampling(texts, list(seeds), steps, guidance)
    for name, folder in models.items():  # one model in memory at a time
        features, sheet[name] = _generate(name, load(folder), sampling, extractor)
        metrics = [evaluator.measure(each) for each in features]
        rows.append(EvaluationRow.of(name, notes.get(name, ""), metrics))
    report = EvaluationReport(
        rows=rows,
        settings={
            "prompts": prompts,
            "seeds": list(seeds),
            "steps": steps,
            "guidance": guidance,
            "size": named(size),
            "reference pictures": len(reference),
        },
        judge=evaluator.judge.about,
        hardware=hardware(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        prompts=texts,
    )
    _write(report, image_grid(sheet, texts[:SHEET_COLUMNS]), evaluator.judge, out)
    return report


def choose(real: ImageSet, prompts: int) -> tuple[list[int], list[int], list[int]]:
    """Row indices of the prompts' images, the reference and the judge's training set.

    Ordered by the hash of the id, so that the order and number of images do not matter. No
    caption occurs twice among the prompts. The reference is all held-out images, with those of
    the prompts.
    """

    def by_hash(indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda i: sha256(real.rows[i]["id"].encode()).digest())

    pairs = by_hash(real.select(split="test-pair", kind=KIND))
    first_of_text: dict[str, int] = {}
    for i in pairs:
        first_of_text.setdefault(real.rows[i]["short"], i)
    chosen = list(first_of_text.values())[:prompts]
    if len(chosen) < prompts:
        raise UserError(
            f"{prompts} prompts requested, but {real.folder} has {len(chosen)} held-out pairs "
            f"(split test-pair, kind {KIND}): use fewer prompts or prepare more pictures"
        )
    reference = pairs + by_hash(real.select(split="test-concept", kind=KIND))
    train = by_hash(real.select(split="train", kind=KIND))[:JUDGE_IMAGES]
    if len(train) < prompts or len({real.rows[i]["concept"] for i in train}) < 2:
        raise UserError(
            f"{real.folder} has {len(train)} pictures to train the judge on (split train, kind "
            f"{KIND}); it needs at least as many as prompts ({prompts}) and two concepts: "
            "prepare more pictures"
        )
    return chosen, reference, train


def _writable(out: Path) -> Path:
    """Creates the folder. UserError before the long work if it cannot be written."""
    with new_file(out / ".probe") as part:
        part.touch()
    (out / ".probe").unlink()
    return out


def _generate(
    name: str, pipeline: Pipeline, sampling: Sampling, extractor: nn.Module
) -> tuple[list[Tensor], list[Image.Image]]:
    """Features [prompts, d] for each seed, and the first seed's images for the sheet."""
    texts, features = sampling.texts, []
    sheet: list[Image.Image] = []
    total = len(texts) * len(sampling.seeds)
    with progress(f"generating with {name}", total, "images") as advance:
        for seed in sampling.seeds:
            rows = []
            for start in range(0, len(texts), CHUNK):
                images = pipeline(
                    texts[start : start + CHUNK],
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    seed=seed * len(texts) + start,  # of the first prompt; it counts up
                ).images
                if seed == sampling.seeds[0]:
                    sheet += images[: SHEET_COLUMNS - len(sheet)]
                rows.append(extract(extractor, images))
                advance(len(images))
            features.append(torch.cat(rows))
    return features, sheet


def _real_features(
    real: ImageSet, indices: list[int], size: tuple[int, int], extractor: nn.Module, what: str
) -> Tensor:
    with progress(f"features of {what}", len(indices), "pictures") as advance:
        some = (at_size(real.image(i), size) for i in indices)
        return extract(extractor, some, on_batch=advance)


def _judge(rows: list[dict], features: Tensor, sentences: Sentences) -> Judge:
    """Trains a judge on the rows' pictures and both captions of each."""
    texts = [sentences([row[caption] for row in rows]).cpu() for caption in ("short", "long")]

    def numbered(names: list[str]) -> Tensor:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[name] for name in names])

    groups = numbered([row["short"] for row in rows])
    concepts = numbered([row["concept"] for row in rows])
    return Judge.fit(features, torch.stack(texts, 1).float(), groups, concepts)


def _loaded(path: Path, size: tuple[int, int]) -> Judge:
    judge = Judge.load(path)
    if judge.about.get("size") != named(size):
        raise UserError(
            f"the judge {path} was trained on {judge.about.get('size')} pixels, the models "
            f"generate {named(size)}: leave it out to train one"
        )
    return judge


def build_evaluator(
    real: ImageSet,
    chosen: list[int],
    reference: list[int],
    train: list[int],
    size: tuple[int, int],
    extractor: nn.Module,
    sentences: Sentences,
    judge: Judge | None,
) -> Evaluator:
    """Extracts the real pictures' features, and trains a judge unless one is given."""
    held_out = _real_features(real, reference, size, extractor, "held-out pictures")
    if judge:
        train = train[: len(chosen)]
    seen = _real_features(real, train, size, extractor, "training pictures")
    if judge is None:
        judge = _judge([real.rows[i] for i in train], seen, sentences)
        judge.about["size"] = named(size)
    texts = sentences([real.rows[i]["short"] for i in chosen]).float().cpu()
    widths = len(judge.picture.mean), len(judge.text.mean)
    if widths != (seen.shape[1], texts.shape[1]):
        raise UserError(
            f"the judge was trained on features of widths {widths}, these have "
            f"{seen.shape[1], texts.shape[1]}: leave it out to train one"
        )
    own = held_out[[reference.index(i) for i in chosen]]
    return Evaluator(held_out, own, seen[: len(chosen)], texts, judge)


def _write(report: EvaluationReport, sheet: Image.Image, judge: Judge, out: Path) -> None:
    """Writes each file atomically; the page, which shows the others, comes last."""
    judge.save(out / "judge.safetensors")
    with new_file(out / "sheet.png") as part:
        sheet.save(part, "PNG", optimize=True)
    report_json = json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n"
    for name, text in (("report.json", report_json), ("report.md", report.markdown())):
        with new_file(out / name) as part:
            part.write_text(text, encoding="utf-8")
