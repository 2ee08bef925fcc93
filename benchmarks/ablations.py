"""The paper's ablations on the mini family: trains every arm with several seeds, and judges.

`python -m benchmarks.ablations --teacher runs/sdxl-mini/model --data data --out runs/ablations`

`data`: prepared with the teacher's VAE from the illustrations, see `docs/mini-family.md`. The
models are copied to OUT/given first, so that all arms learn from the same ones whatever becomes of
their runs. The same command goes on where it was stopped: trainings, drawings and scores are kept,
and arms or seeds may be added. All arms are trained with the first seed, then all with the second.

OUT/report is the report of `koala evaluate`, OUT/ablations.json and OUT/ablations.md say for each
line of the paper whether it was reproduced. Depth rules differ only where the teacher is deeper
than the family's two blocks a stage: give a deeper one to --deep-teacher, such as that of `koala
distill sdxl-mini-64 --set architecture=sdxl-mini-deep`. A step-distilled one goes to
--fast-teacher, and the teacher pruned to the student's size to --pruned (`koala compress TEACHER
--prune 0.55 --calibrate DATA`): does that beat the fixed map as a start? Arms whose teacher or
start is not given are left out, and said to be not measured.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import command
from koala.errors import UserError, unknown
from koala.evaluation.report import evaluate
from koala.evaluation.table import Comparison, EvaluationReport
from koala.recipes.train import distill
from koala.utils import markdown
from koala.utils.atomic import new_folder, write_text
from koala.utils.device import hardware

RECIPE = "koala-mini-sa"
OPTIONS = {
    "teacher": "teacher", "deep": "deep-teacher", "fast": "fast-teacher", "pruned": "pruned",
}  # fmt: skip
NO_FEATURES = ("settings.feature_weight=0", "settings.taps=", "settings.normalise=false")
JUDGED_BY = ("r@5", "fd-efflite0")  # the metrics of the verdicts, unless others are asked for


@dataclass(frozen=True)
class Arm:
    """A training that differs from `RECIPE` in some settings, and in its teacher if it says so."""

    settings: tuple[str, ...]
    teacher: str = "teacher"  # or "deep", "fast"
    student: str | None = None  # "pruned": it starts from there, not from the teacher's cut

    @property
    def models(self) -> set[str]:
        """What must be given for it."""
        return {self.teacher} | ({self.student} if self.student else set())


ARMS = {
    "task": Arm(("settings.output_weight=0", *NO_FEATURES)),
    "task+out": Arm(NO_FEATURES),
    "SA": Arm(("settings.taps=sa",)),
    "CA": Arm(("settings.taps=ca",)),
    "FFN": Arm(("settings.taps=ffn",)),
    "residual": Arm(("settings.taps=residual",)),
    "LF": Arm(("settings.taps=lf",)),
    "SA+LF@DW-1,UP-3": Arm(("settings.taps=sa+lf@DW-1,UP-3",)),
    "SA+LF": Arm(("settings.taps=sa+lf",)),
    "SA@DW": Arm(("settings.taps=sa@DW-2,DW-3",)),
    "SA@UP": Arm(("settings.taps=sa@UP-1,UP-2",)),
    "short captions": Arm(("mixture.captions=short:1",)),
    "long captions": Arm(("mixture.captions=long:1",)),
    "bottom": Arm(("settings.depth_rule=bottom",), "deep"),
    "interleave": Arm(("settings.depth_rule=interleave",), "deep"),
    "up": Arm(("settings.depth_rule=up",), "deep"),
    "step-distilled teacher": Arm((), "fast"),
    "pruned": Arm(("settings.taps=sa", "cut=none"), student="pruned"),
}


@dataclass(frozen=True)
class Line:
    """What the paper reports, or we would like: the first arm is better than the second."""

    says: str
    first: str
    second: str


PAPER = (
    Line("distillation beats the task alone", "SA", "task"),
    Line("its output loss does already", "task+out", "task"),
    Line("self-attention beats cross-attention", "SA", "CA"),
    Line("self-attention beats the feed-forward layers", "SA", "FFN"),
    Line("self-attention beats the residual blocks", "SA", "residual"),
    Line("self-attention beats the last feature (BK-SDM)", "SA", "LF"),
    Line("the last feature of DW-1 and UP-3 adds to it", "SA+LF@DW-1,UP-3", "SA"),
    Line("that of all stages adds less", "SA+LF@DW-1,UP-3", "SA+LF"),
    Line("the decoder's features matter more than the encoder's", "SA@UP", "SA@DW"),
    Line("long captions beat short ones", "long captions", "short captions"),
    Line("the lower blocks are the ones to keep", "bottom", "interleave"),
    Line("the upper ones are the worst", "interleave", "up"),
    Line("a step-distilled teacher beats its base", "step-distilled teacher", "SA+LF@DW-1,UP-3"),
)
OURS = (Line("pruning by what it costs beats the fixed cut as a start", "pruned", "SA"),)


def train_arms(
    arms: Sequence[str],
    seeds: Sequence[int],
    given: dict[str, Path],
    data: Path,
    out: Path,
    samples: int | None,
    settings: Sequence[str],
) -> dict[str, list[Path]]:
    """Every arm's finished models, seed by seed; what is finished is not trained again.

    given: teachers and starts, by what an arm calls them.
    """
    models: dict[str, list[Path]] = {name: [] for name in arms}
    length = [f"training.samples={samples}"] if samples else []
    for seed in seeds:
        for name in arms:
            folder = out / "runs" / f"{name.replace(' ', '-')}-{seed}"
            arm = ARMS[name]
            own = [*arm.settings, *length, f"training.seed={seed}", *settings]
            teacher, student = str(given[arm.teacher]), arm.student and str(given[arm.student])
            made = distill(RECIPE, data, folder, teacher, settings=own, student=student)
            models[name].append(made)
    return models


def frozen(model: str | Path, folder: Path) -> Path:
    """A copy of the model, which later trainings of it do not change."""
    if not folder.is_dir():
        with new_folder(folder) as part:
            shutil.copytree(model, part, dirs_exist_ok=True)
    return folder


def verdicts(report: EvaluationReport, metric: str) -> list[dict[str, object]]:
    """For each line what was found, as text and with the difference's interval."""
    found: dict[tuple[str, str], Comparison] = {
        (c.first, c.second): c for c in report.comparisons if c.column.endswith(f" {metric}")
    }
    rows: list[dict[str, object]] = []
    for line in (*PAPER, *OURS):
        straight, turned = (line.first, line.second), (line.second, line.first)
        if (one := found.get(straight) or found.get(turned)) is None:
            rows.append({**asdict(line), "verdict": "not measured"})
            continue
        sign = 1 if straight in found else -1
        d = one.verdict.difference
        bounds = sorted(sign * bound for bound in (d.low, d.high))
        better = "better" if sign == 1 else "worse"
        says = {better: "reproduced", "equal": "refuted: equal"}.get(one.verdict.says)
        if says is None:
            told = one.verdict.says == "cannot be told"
            says = one.verdict.text if told else "refuted"
        rows.append(
            {**asdict(line), "verdict": says, "difference": sign * d.value, "interval": bounds}
        )
    return rows


def page(report: EvaluationReport, found: dict[str, list[dict[str, object]]]) -> str:
    """The findings, by metric, as Markdown."""

    def difference(row: dict[str, object]) -> str:
        if "interval" not in row:
            return ""
        low, high = row["interval"]  # type: ignore[misc]  # two numbers
        return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"

    def cells(rows: tuple[dict[str, object], ...]) -> list[object]:
        line = rows[0]
        judged = (cell for row in rows for cell in (difference(row), row["verdict"]))
        return [line["says"], line["first"], line["second"], *judged]

    heads = [head for metric in found for head in (f"difference in {metric}", f"by {metric}")]
    lines = markdown.table(
        ["the paper; last, our own", "first", "second", *heads],
        map(cells, zip(*found.values(), strict=True)),
    )
    return f"""# The paper's ablations on the mini family

{lines}

Brackets hold 95 % intervals over prompts and over training again; "cannot be told" names what would
tell. The models are small, their domain is illustrations, and they are trained for minutes: what is
refuted here is refuted of them.

## All arms

{report.table()}

Hardware: {hardware()}

Command: `{command("ablations")}`
"""


def chosen_arms(only: Sequence[str], given: dict[str, Path]) -> list[str]:
    """The arms that can be trained. UserError for a name that is not known."""
    for name in only:
        if name not in ARMS:
            raise unknown("arm", name, ARMS)
    found = [name for name in only or ARMS if ARMS[name].models <= given.keys()]
    if not found:
        missing = {model for name in only for model in ARMS[name].models - given.keys()}
        options = ", ".join(f"--{OPTIONS[model]}" for model in sorted(missing))
        raise UserError(f"no model for {', '.join(only)}: give {options}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, type=Path)
    parser.add_argument("--deep-teacher", type=Path, help="of more blocks a stage, for depth rules")
    parser.add_argument("--fast-teacher", type=Path, help="step-distilled")
    parser.add_argument("--pruned", type=Path, help="the teacher, pruned to the student's size")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--pictures", type=Path, help="the illustrations (default: --data)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--samples", type=int, help="of each training (default: the recipe's)")
    parser.add_argument("--set", nargs="+", default=[], help="further settings of every training")
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--metrics", nargs="+", default=[])
    parser.add_argument("--judge-by", nargs="+", default=JUDGED_BY, help="metrics of the verdicts")
    parser.add_argument("--nice", type=int, default=0, help="to be added to the priority")
    o = parser.parse_args(arguments)
    os.nice(o.nice)
    asked = {name: vars(o)[option.replace("-", "_")] for name, option in OPTIONS.items()}
    given = {name: place for name, place in asked.items() if place}
    arms = chosen_arms(o.only, given)
    given = {name: frozen(place, o.out / "given" / name) for name, place in given.items()}
    models = train_arms(arms, o.seeds, given, o.data, o.out, o.samples, o.set)
    report = evaluate(
        models, o.out / "report", pictures=o.pictures or o.data, count=o.count, seeds=[0],
        metrics=o.metrics,
    )  # fmt: skip
    assert report is not None
    found = {metric: verdicts(report, metric) for metric in o.judge_by}
    write_text(o.out / "ablations.json", json.dumps(found, indent=1) + "\n")
    write_text(o.out / "ablations.md", page(report, found))
    print(page(report, found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks.ablations: {error}")
