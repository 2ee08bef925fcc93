"""`koala evaluate` and `koala benchmark`: how good models are, and how fast."""

import argparse
import sys
from pathlib import Path

from koala.benchmark.cases import ROUNDS
from koala.checkpoints.tensors import DTYPES
from koala.cli.command import Command, Parser, listed, number, say, show, whole
from koala.errors import UserError
from koala.evaluation.metrics.catalogue import METRICS
from koala.evaluation.metrics.weights import WEIGHTS
from koala.evaluation.prompt_sets import ILLUSTRATIONS, SETS
from koala.generation.validation import BACKENDS
from koala.utils.threads import sleep_while_waiting


def _evaluate_arguments(p: Parser) -> None:
    p.add_argument(
        "model", nargs="*",
        help="MODEL, a folder of pictures that any program drew, or NAME=RUN,RUN,... for several "
        "trainings; one row of the report each",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    p.add_argument(
        "--compare", nargs=2, default=[], metavar=("A", "B"),
        help="two models or folders of pictures, side by side; measured only by --metrics",
    )  # fmt: skip
    p.add_argument(
        "--page", action="store_true",
        help="with --compare: a blind page, OUT/blind.html, that counts wins by keyboard",
    )  # fmt: skip

    asked = p.add_argument_group("what is drawn")
    asked.add_argument(
        "--prompts", nargs="+", default=[], metavar="FILE|SET",
        help="text, csv, json or parquet files, prepared data (its held-out captions), or "
        f"published sets by NAME=PATH: {listed(SETS)}",
    )  # fmt: skip
    asked.add_argument(
        "--count", type=whole, metavar="N",
        help=f"prompts of each set (default all; {ILLUSTRATIONS} of the illustrations)",
    )  # fmt: skip
    asked.add_argument(
        "--seeds", type=whole, nargs="+",
        help="evaluation seeds (default: as many as the set's authors draw; 0 1 2 for the "
        "illustrations)",
    )  # fmt: skip
    asked.add_argument(
        "--steps", nargs="+", default=[], metavar="N",
        help="denoising steps, of all or by row: 10 sdxl=25 (default: each model's own)",
    )  # fmt: skip
    asked.add_argument(
        "--guidance", nargs="+", default=[], metavar="G",
        help="guidance scale, CFG, of all or by row (default: each model's own)",
    )  # fmt: skip
    asked.add_argument(
        "--size", metavar="WIDTHxHEIGHT", help="at which all are compared (default: their own)"
    )
    asked.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best available)")

    measured = p.add_argument_group("what is measured")
    measured.add_argument(
        "--pictures", type=Path, metavar="DIR",
        help="real pictures to compare with; of the illustrations also the prompts",
    )  # fmt: skip
    measured.add_argument(
        "--metrics", nargs="+", default=[], metavar="METRIC",
        help=f"{listed(METRICS)} (default: what the set's authors report; for the illustrations "
        "what needs no download)",
    )  # fmt: skip
    measured.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=PATH",
        help=f"local copies or other Hub ids of the metrics' weights: {listed(WEIGHTS)}",
    )  # fmt: skip
    measured.add_argument(
        "--judge", type=Path, metavar="FILE",
        help="judge.safetensors of an earlier report (default: train one)",
    )  # fmt: skip
    p.add_argument("--card", action="store_true", help="also enter the row in each model's card")
    p.add_json("the report")


def _evaluate(o: argparse.Namespace) -> None:
    from koala.evaluation.cards import enter, folders_with_cards
    from koala.evaluation.plan import plan

    if bool(o.model) == bool(o.compare):
        raise UserError("give models to measure, or two to --compare A B")
    if o.page and not o.compare:
        raise UserError("--page is of two models: koala evaluate --compare A B --page")
    asked = plan(
        o.model or o.compare, o.out, o.prompts, o.pictures, metrics=o.metrics, count=o.count,
        seeds=o.seeds, steps=o.steps, guidance=o.guidance, size=o.size, weights=o.weights,
        judge=o.judge, device=o.device, measured=bool(o.model or o.metrics),
    )  # fmt: skip
    cards = folders_with_cards(asked.rows) if o.card else {}
    sleep_while_waiting()
    from koala.evaluation.report import run  # all is checked: now torch may load

    report = run(asked)
    if report is None:  # another process of torchrun says it
        return
    enter(report, cards)
    if o.compare:
        from koala.evaluation.pages import write_pages

        for line in write_pages(asked, o.page):
            say(line)
    if o.json or report.columns:  # else nothing was measured
        show(o, report.as_dict(), report.table())


def _benchmark_arguments(p: Parser) -> None:
    p.add_argument(
        "model", nargs="*",
        help="bundled name, folder or Hub id, or a row of the published table, such as "
        "koala-lightning-700m, with random weights (default: the whole table)",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, default=Path("benchmark"), metavar="DIR",
        help="new folder (default benchmark)",
    )  # fmt: skip
    p.add_argument(
        "--rounds", type=whole, default=ROUNDS, metavar="N",
        help=f"at most so many images of each way to draw (default {ROUNDS}); fewer where the "
        "intervals are narrow earlier",
    )  # fmt: skip
    p.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best available)")
    p.add_argument("--dtype", help=f"{listed(DTYPES)} (default: fp32 on a CPU, fp16 elsewhere)")
    p.add_argument("--backend", help=f"of koala, on a CPU: {listed(BACKENDS)}")
    p.add_argument("--compile", action="store_true", help="compile koala's side")
    p.add_argument("--graphs", action="store_true", help="replay koala's steps from CUDA graphs")
    p.add_argument(
        "--threads", type=whole, nargs="+", default=[], metavar="N",
        help="on a CPU: numbers of threads (default: 1, and as many as there are cores)",
    )  # fmt: skip
    p.add_argument("--seconds", type=number, metavar="S", help="stop after this long")
    p.add_json("the report")


def _benchmark(o: argparse.Namespace) -> None:
    from koala.benchmark.cases import check

    check(o.model, o.out, o.device, o.dtype, o.rounds, o.backend, o.compile, o.graphs, o.threads)
    from koala.benchmark.run import benchmark  # all is checked: now torch may load

    report = benchmark(
        o.model, o.out, o.device, o.dtype, o.rounds, o.backend, o.compile, o.graphs, o.seconds,
        o.threads, lambda row: print(row.line(), file=sys.stderr),
    )  # fmt: skip
    show(o, report.as_dict(), report.table())


EVALUATE = Command(
    "evaluate",
    "score models and pictures by the field's metrics",
    (
        "koala evaluate koala-mini --pictures illustrations --out report",
        "koala evaluate teacher=path/to/model student=runs/a,runs/b,runs/c --prompts prompts.txt "
        "--metrics hpsv2.1 clip-score --out report-2",
        "koala evaluate koala=etri-vilab/koala-lightning-700m sdxl=path/to/sdxl --steps 10 sdxl=25 "
        "--prompts hpsv2=HPDv2/benchmark t2i-compbench=T2I-CompBench --out table",
        "koala evaluate --compare koala-mini path/to/pictures --prompts prompts.txt --page "
        "--out blind",
    ),
    _evaluate_arguments,
    _evaluate,
)
BENCHMARK = Command(
    "benchmark",
    "measure latency and memory beside stock diffusers",
    (
        "koala benchmark koala-mini --out benchmark-mini",
        "koala benchmark koala-lightning-700m sdxl-base-1.0 --graphs --out benchmark-two",
    ),
    _benchmark_arguments,
    _benchmark,
)
