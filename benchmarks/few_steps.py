"""Which method of step distillation is best at equal cost: all train, and draw in 1 to 10 steps.

From one frozen teacher and one student, the methods of `koala.distillation.few_steps` train, and
guided distillation (`koala-mini-guided`) as the floor that they have to beat: each for the same
core-seconds, with several training seeds. First a few steps of each are timed, which says how many
samples that is. Then `koala evaluate` measures all of them at 1, 2, 4 and 10 steps without
guidance, beside the student that they started from, and the teacher with guidance.

A cell is the mean over training seeds (of the mean over evaluation seeds), with half of its 95 %
interval (Student's t over the training seeds, if there are several).

`python -m benchmarks.few_steps --data data --teacher koala-mini --student runs/guided/model
--out runs/few-steps` goes on where it was stopped. It writes `few_steps.json` and `few_steps.md`
into OUT, and below it every run, and every report with a sheet of what was drawn.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import command
from koala.errors import UserError
from koala.evaluation.report import evaluate
from koala.recipes import configured
from koala.recipes.recipe import Student
from koala.recipes.train import distill
from koala.utils import markdown
from koala.utils.atomic import write_text
from koala.utils.device import hardware

_CRITIC = ("training.lr=2e-4", "training.critic_lr=4e-4", "training.critic_updates=3")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {  # the recipe, and what is changed
    "guided": ("koala-mini-guided", ("cut=none",)),
    "progressive": ("koala-mini-lightning", ()),
    "dmd": (
        "koala-mini-lightning",
        ("settings.method=dmd", "settings.substeps=none", *_CRITIC),
    ),
    "mmd": (
        "koala-mini-lightning",
        (
            "settings.method=mmd", "settings.substeps=none", "settings.guidance=none",
            "settings.taps=lf", "training.lr=2e-4",
        ),
    ),
}  # fmt: skip
STEPS = (1, 2, 4, 10)
GUIDANCE = 3.5  # of the teacher
MEASURES = {"r@5": 3, "fd-efflite0": 1}  # digits
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, two-sided, by number of seeds
TIMED = (2, 6)  # cycles of steps, of two runs whose difference is timed


@dataclass(frozen=True)
class Trial:
    """What is compared, and at what cost."""

    data: Path
    teacher: str
    student: str
    out: Path
    core_seconds: float  # of each training
    batch: int
    seeds: tuple[int, ...]  # of training
    evaluation_seeds: tuple[int, ...]
    prompts: int
    extra: tuple[str, ...]  # settings of every run
    steps: tuple[int, ...] = STEPS

    def about(self) -> dict[str, Any]:
        """What must not change when the trial goes on, for JSON."""
        seeds = {"seeds": list(self.seeds), "evaluation_seeds": list(self.evaluation_seeds)}
        numbers = {"core_seconds": self.core_seconds, "batch": self.batch, "prompts": self.prompts}
        models = {"teacher": self.teacher, "student": self.student}
        return {**models, **numbers, **seeds, "steps": list(self.steps), "extra": list(self.extra)}


def recipe_of(trial: Trial, method: str, samples: int, seed: int) -> Student:
    """The method's recipe for so many samples."""
    name, changes = METHODS[method]
    length = (f"training.samples={samples}", f"training.batch={trial.batch}",
              f"training.seed={seed}", f"training.warmup={samples // 20}",
              f"training.preview_every={samples}")  # fmt: skip
    recipe = configured(name, (*changes, *length, *trial.extra))
    assert isinstance(recipe, Student)
    return recipe


def train(trial: Trial, method: str, samples: int, seed: int, out: Path) -> float:
    """Trains; returns the core-seconds that this process spent."""
    before = time.process_time()
    recipe = recipe_of(trial, method, samples, seed)
    distill(recipe, trial.data, out, trial.teacher, "cpu", student=trial.student)
    return time.process_time() - before


def plan(trial: Trial) -> dict[str, int]:
    """Samples of each method that take `core_seconds`, whole cycles of its steps; kept in OUT."""
    file, about = trial.out / "plan.json", trial.about()
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["trial"] != about:
            raise UserError(f"{trial.out} holds a trial with other settings: choose another --out")
        return kept["samples"]
    samples = {}
    for method in METHODS:
        recipe = recipe_of(trial, method, trial.batch, 0)
        cycle = trial.batch * (recipe.training.critic_updates + 1)
        seconds = [
            train(trial, method, cycles * cycle, 0, trial.out / "timing" / f"{method}-{cycles}")
            for cycles in TIMED
        ]
        # Noise must not make a cycle free: the start is at most nine tenths of the longer run.
        each = max((seconds[1] - seconds[0]) / (TIMED[1] - TIMED[0]), seconds[1] / TIMED[1] / 10)
        samples[method] = cycle * max(1, round(trial.core_seconds / each))
    write_text(file, json.dumps({"trial": about, "samples": samples}, indent=2) + "\n")
    return samples


def measure(trial: Trial, runs: dict[str, Path], **options: Any) -> dict[str, Any]:
    """{steps: {row: {measure: values by evaluation seed}}} of all models; kept in OUT."""
    found: dict[str, Any] = {}
    judge = trial.out / "judge.safetensors"
    models = {"student": Path(trial.student), **runs}
    for steps in trial.steps:
        rows: dict[str, Any] = {}
        for folder, guidance, shown in (
            (f"drawn-{steps}", 1.0, models),
            (f"teacher-{steps}", GUIDANCE, {"teacher, guided": trial.teacher}),
        ):
            out = trial.out / folder
            if not (out / "report.json").exists():
                evaluate(
                    shown, out, pictures=trial.data, count=trial.prompts,
                    seeds=trial.evaluation_seeds, steps=steps, guidance=guidance,
                    judge=judge if judge.exists() else None, **options,
                )  # fmt: skip
            if not judge.exists():
                judge.write_bytes((out / judge.name).read_bytes())
            report = json.loads((out / "report.json").read_text())
            for row in report["rows"]:
                rows[row["name"]] = {
                    key.split()[-1]: cell["by_seed"][0] if cell["by_seed"] else [cell["value"]]
                    for key, cell in row["cells"].items()  # by "PROMPTS METRIC"
                }
        found[str(steps)] = rows
    return found


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval; None for fewer than two values."""
    half = None
    if len(values) > 1:
        half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def table(measured: dict[str, Any], seeds: Sequence[int]) -> str:
    """Rows are models, columns steps and measures."""
    header = ["", *(f"{measure}, {steps}" for measure in MEASURES for steps in measured)]
    single = [name for name in next(iter(measured.values())) if not _seed_of(name)]
    rows = []
    for name in (*single, *METHODS):
        names = [name] if name in single else [f"{name}-{seed}" for seed in seeds]
        cells = [
            _cell([statistics.mean(rows_[each][measure]) for each in names], digits)
            for measure, digits in MEASURES.items()
            for rows_ in measured.values()
        ]
        rows.append([name, *cells])
    return markdown.table(header, rows)


def _seed_of(name: str) -> bool:
    return name.rpartition("-")[0] in METHODS


def _cell(values: Sequence[float], digits: int) -> str:
    mean, half = summary(values)
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def run(trial: Trial, **options: Any) -> dict[str, Any]:
    """The whole trial; options (extractor, sentences) as of `koala.evaluation.report.evaluate`."""
    if len(trial.seeds) not in (1, *T_95):
        raise UserError(f"{len(trial.seeds)} training seeds: give 1 to {max(T_95)}")
    samples, runs = plan(trial), dict[str, Path]()
    for seed in trial.seeds:
        for method, number in samples.items():
            out = trial.out / f"{method}-{seed}"
            if not (out / "core_seconds.json").exists():
                spent = train(trial, method, number, seed, out)
                write_text(out / "core_seconds.json", json.dumps(spent))
            runs[f"{method}-{seed}"] = out / "model"
    measured = measure(trial, runs, **options)
    spent = {name: json.loads((path.parent / "core_seconds.json").read_text())
             for name, path in runs.items()}  # fmt: skip
    record = {
        "trial": trial.about(), "samples": samples, "core_seconds": spent, "measured": measured,
        "hardware": hardware(), "command": command("few_steps"),
    }  # fmt: skip
    write_text(trial.out / "few_steps.json", json.dumps(record, indent=2) + "\n")
    write_text(trial.out / "few_steps.md", table(measured, trial.seeds) + "\n")
    return record


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--teacher", default="koala-mini")
    p.add_argument("--student", required=True, help="a model of the teacher's own U-Net")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--core-seconds", type=float, default=600.0)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--evaluation-seeds", type=int, default=3)
    p.add_argument("--prompts", type=int, default=200)
    p.add_argument("--set", nargs="+", default=[], help="settings of every run")
    o = p.parse_args()
    trial = Trial(
        o.data, o.teacher, o.student, o.out, o.core_seconds, o.batch, tuple(range(o.seeds)),
        tuple(range(o.evaluation_seeds)), o.prompts, tuple(o.set),
    )  # fmt: skip
    run(trial)
    print((trial.out / "few_steps.md").read_text())


if __name__ == "__main__":
    main()
