"""The report on a row of models: distances and retrieval, as a table and a sheet of pictures.

Every model draws the same prompts with the same noise. The prompts are captions of real pictures
that were held out as a pair: their concept and their style were both seen in training, never
together. The first row is those real pictures themselves; what it reaches is what can be reached.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from koala.data.illustrations.pictures import PictureSet
from koala.errors import UserError
from koala.evaluation.distances import frechet, kernel_distance
from koala.evaluation.features import EffLite0, at_size, extract
from koala.evaluation.judge import Judge
from koala.evaluation.models import REAL, check, named
from koala.evaluation.table import Report, Row
from koala.generation import Pipeline, load
from koala.mini.sentence_encoder import SentenceEncoder
from koala.utils.contact_sheet import picture_grid
from koala.utils.device import hardware
from koala.utils.progress import progress

KIND = "emoji"
JUDGE_PICTURES = 4000  # at most; about three minutes of features on two cores
SHEET_COLUMNS = 12
CHUNK = 32  # prompts between two steps of the progress bar
KERNEL_SUBSET = 100

Sentences = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Sampling:
    """What every model draws: `texts` once for each of `seeds`."""

    texts: list[str]
    seeds: list[int]
    steps: int
    guidance: float


@dataclass(frozen=True)
class Yardstick:
    """What pictures are measured against.

    held_out [m, d]: the reference of the distances. own [n, d]: the prompts' real pictures, which
    are among them. others [n, d]: as many real pictures of the training split. texts [n, d_t]:
    the prompts.
    """

    held_out: Tensor
    own: Tensor
    others: Tensor
    texts: Tensor
    judge: Judge

    def measure(self, features: Tensor) -> dict[str, float]:
        """All measures of pictures drawn for the prompts, features [n, d]."""
        return self._distances(features) | self.judge.retrieval(features, self.texts)

    def real(self) -> dict[str, float]:
        """What real pictures reach: distances of the others, retrieval of the prompts' own."""
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
    pictures: str | Path,
    out: str | Path,
    prompts: int = 200,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 10,
    guidance: float = 3.5,
    notes: Mapping[str, str] | None = None,
    judge: str | Path | None = None,
    extractor: nn.Module | None = None,
    sentences: Sentences | None = None,
) -> Report:
    """Measure models against held-out real pictures and write a report.

    Args:
        models: name in the report -> model folder (or a bundled model's name), drawn in order.
        pictures: a folder of prepared pictures, with the splits train, test-pair and test-concept.
        out: folder for report.json, report.md, sheet.png and judge.safetensors.
        prompts: how many held-out pairs to draw, chosen by the hash of their id.
        seeds: evaluation seeds, each at least 0.
        steps, guidance: of sampling.
        notes: name in the report -> what to say of that model, such as its samples seen.
        judge: a judge.safetensors of an earlier report on the same pictures; None trains one.
        extractor: picture features, uint8 [n, 3, h, w] -> [n, d]; None for EfficientNet-Lite0.
        sentences: text features, n texts -> [n, d_t] of length 1; None for MiniLM.

    Raises:
        UserError: a wrong model, too few pictures, an unwritable folder, a missing package.
    """
    size = check(models, pictures, prompts, seeds, steps, guidance, judge)
    notes = dict(notes or {})
    if unknown := set(notes) - {REAL, *models}:
        raise UserError(f"notes on {sorted(unknown)}: the report's rows are {[REAL, *models]}")
    real = PictureSet(pictures)
    chosen, reference, train = choose(real, prompts)
    texts = [real.rows[i]["short"] for i in chosen]
    out = _writable(Path(out))
    trained = _loaded(Path(judge), size) if judge else None
    extractor = extractor or EffLite0().to("cuda" if torch.cuda.is_available() else "cpu")
    yardstick = yardstick_of(
        real, chosen, reference, train, size, extractor, sentences or SentenceEncoder(), trained
    )
    rows = [Row.of(REAL, notes.get(REAL, ""), [yardstick.real()])]
    sheet = {REAL: [at_size(real.image(i), size) for i in chosen[:SHEET_COLUMNS]]}
    sampling = Sampling(texts, list(seeds), steps, guidance)
    for name, folder in models.items():  # one in memory at a time
        features, sheet[name] = _draw(name, load(folder), sampling, extractor)
        measured = [yardstick.measure(of_seed) for of_seed in features]
        rows.append(Row.of(name, notes.get(name, ""), measured))
    report = Report(
        rows=rows,
        settings={
            "prompts": prompts,
            "seeds": list(seeds),
            "steps": steps,
            "guidance": guidance,
            "size": named(size),
            "reference pictures": len(reference),
        },
        judge=yardstick.judge.about,
        hardware=hardware(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        prompts=texts,
    )
    _write(report, picture_grid(sheet, texts[:SHEET_COLUMNS]), yardstick.judge, out)
    return report


def choose(real: PictureSet, prompts: int) -> tuple[list[int], list[int], list[int]]:
    """Rows of the prompts' pictures, of the reference and of the judge's training.

    In the order of their ids' hashes, so that neither the order nor the number of pictures
    decides; no caption twice among the prompts. The reference is all that is held out, the
    prompts' own pictures too.
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
            f"{prompts} prompts were asked for, but {real.folder} holds {len(chosen)} held-out "
            f"pairs (split test-pair, kind {KIND}): ask for fewer or prepare more pictures"
        )
    reference = pairs + by_hash(real.select(split="test-concept", kind=KIND))
    train = by_hash(real.select(split="train", kind=KIND))[:JUDGE_PICTURES]
    if len(train) < prompts or len({real.rows[i]["concept"] for i in train}) < 2:
        raise UserError(
            f"{real.folder} holds {len(train)} pictures to train the judge on (split train, kind "
            f"{KIND}); it takes at least as many as prompts ({prompts}) and two concepts: prepare "
            "more pictures"
        )
    return chosen, reference, train


def _writable(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (probe := out / ".partial").touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the report's folder {out} cannot be written ({error.strerror}): give another"
        ) from None
    return out


def _draw(
    name: str, pipeline: Pipeline, sampling: Sampling, extractor: nn.Module
) -> tuple[list[Tensor], list[Image.Image]]:
    """Features [prompts, d] for each seed, and the first seed's pictures for the sheet."""
    texts, features = sampling.texts, []
    sheet: list[Image.Image] = []
    total = len(texts) * len(sampling.seeds)
    with progress(f"drawing with {name}", total, "pictures") as advance:
        for seed in sampling.seeds:
            rows = []
            for start in range(0, len(texts), CHUNK):
                images = pipeline(
                    texts[start : start + CHUNK],
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    seed=seed * len(texts) + start,  # of the first; the next take the next ones
                ).images
                if seed == sampling.seeds[0]:
                    sheet += images[: SHEET_COLUMNS - len(sheet)]
                rows.append(extract(extractor, images))
                advance(len(images))
            features.append(torch.cat(rows))
    return features, sheet


def _real_features(
    real: PictureSet, indices: list[int], size: tuple[int, int], extractor: nn.Module, what: str
) -> Tensor:
    with progress(f"features of {what}", len(indices), "pictures") as advance:
        some = (at_size(real.image(i), size) for i in indices)
        return extract(extractor, some, on_batch=advance)


def _judge(rows: list[dict], features: Tensor, sentences: Sentences) -> Judge:
    """A judge trained on the rows' pictures and both captions of each."""
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
            f"the judge {path} was trained on pictures of {judge.about.get('size')} pixels, the "
            f"models draw {named(size)}: leave it out, and one is trained"
        )
    return judge


def yardstick_of(
    real: PictureSet,
    chosen: list[int],
    reference: list[int],
    train: list[int],
    size: tuple[int, int],
    extractor: nn.Module,
    sentences: Sentences,
    judge: Judge | None,
) -> Yardstick:
    """Features of the real pictures, and a judge trained on some of them unless one is given."""
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
            f"{seen.shape[1], texts.shape[1]}: leave it out, and one is trained"
        )
    own = held_out[[reference.index(i) for i in chosen]]
    return Yardstick(held_out, own, seen[: len(chosen)], texts, judge)


def _write(report: Report, sheet: Image.Image, judge: Judge, out: Path) -> None:
    """Each file whole or not at all; the page that shows the others comes last."""

    def put(name: str, text: str) -> None:
        (partial := out / f"{name}.partial").write_text(text, encoding="utf-8")
        os.replace(partial, out / name)

    judge.save(out / "judge.safetensors")
    sheet.save(partial := out / "sheet.png.partial", "PNG", optimize=True)
    os.replace(partial, out / "sheet.png")
    put("report.json", json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    put("report.md", report.markdown())
