"""`koala evaluate` and `koala benchmark`: how good models are, and how fast."""

import argparse
import sys
from pathlib import Path

from koala.benchmark.cases import ROUNDS
from koala.checkpoints.tensors import DTYPES
from koala.cli.command import Command, Parser, listed, number, show, whole
from koala.generation.validation import BACKENDS
from koala.utils.extras import require


def _evaluate_arguments(p: Parser) -> None:
    p.add_argument("model", nargs="+", help="MODEL or NAME=MODEL, one row of the report each")
    p.add_argument(
        "--pictures", type=Path, required=True, metavar="DIR",
        help="folder that koala prepare made of the illustrations",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    p.add_argument(
        "--prompts", type=whole, default=200, metavar="N", help="held-out prompts (default 200)"
    )
    p.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    p.add_argument("--steps", type=whole, default=10, help="denoising steps (default 10)")
    p.add_argument("--guidance", type=number, default=3.5, help="guidance scale, CFG (default 3.5)")
    p.add_argument(
        "--judge", type=Path, metavar="FILE",
        help="judge.safetensors of an earlier report (default: train one)",
    )  # fmt: skip
    p.add_argument("--card", action="store_true", help="also enter the row in each model's card")
    p.add_json("the report")


def _evaluate(o: argparse.Namespace) -> None:
    require("koala evaluate", "evaluate", "pyarrow", "efficientnet_lite_pytorch")
    from koala.evaluation.cards import check_cards, enter
    from koala.evaluation.models import by_name, check

    models = by_name(o.model)
    if o.card:
        check_cards(models)
    check(models, o.pictures, o.prompts, o.seeds, o.steps, o.guidance, o.judge)
    from koala.evaluation.report import evaluate  # all is checked: now torch may load

    report = evaluate(
        models, o.pictures, o.out, o.prompts, o.seeds, o.steps, o.guidance, judge=o.judge
    )
    if o.card:
        enter(report, models)
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
    "score models against held-out images",
    (
        "koala evaluate koala-mini --pictures illustrations --out report",
        "koala evaluate teacher=path/to/model student=koala-mini --pictures illustrations "
        "--out report-2",
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
