"""`koala prepare`, `distill`, `finetune` and `runs`: from captioned images to a trained model."""

import argparse
from dataclasses import asdict
from pathlib import Path

from koala import recipes
from koala.cli.command import (
    Command,
    Parser,
    assembled,
    check_push,
    first_process,
    listed,
    number,
    push,
    show,
    whole,
)
from koala.data.captions import POLICIES
from koala.data.items import KINDS
from koala.distillation.records import LOGGERS
from koala.errors import UserError
from koala.recipes.gpus import GPUS
from koala.utils.extras import require

PREPARATION = ("size", "captions", "upscale", "mirror", "posterior", "text", "long_captions",
               "held_out")  # fmt: skip
FILTERS = ("min_side", "max_aspect", "min_words", "max_words", "max_nsfw", "min_similarity",
           "keep_duplicates")  # fmt: skip


def _prepare_arguments(p: Parser) -> None:
    from koala.data.illustrations.scenes import ILLUSTRATIONS

    p.add_argument(
        "source", help="a folder of images, a table that names them, webdataset tars, parquet "
        "files, a saved data set or ye-pop chunks; ORG/NAME of a data set on the Hub; or "
        f"{listed(ILLUSTRATIONS)}, which koala renders itself",
    )  # fmt: skip
    p.add_argument(
        "--as", dest="kind", metavar="KIND",
        help=f"what the source is, where that is unclear: {listed(KINDS)}",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder; run again to resume"
    )
    p.add_argument("--model", help="whose VAE encodes: bundled name, folder, file or Hub id")
    p.add_argument(
        "--workers", type=whole, metavar="N", help="processes that read images (default: all cores)"
    )
    p.add_argument("--device", help="that encodes: cpu or cuda (default: the best available)")
    p.add_argument(
        "--sheet", type=Path, metavar="FILE", help="a contact sheet of the illustrations, a PNG"
    )
    p.add_json("the report")
    p.add_parts("--model")
    stored = p.add_argument_group("what is stored")
    stored.add_argument(
        "--size", type=whole, metavar="PIXELS",
        help="side of the square bucket (default 1024; 128 for the illustrations)",
    )  # fmt: skip
    stored.add_argument(
        "--caption", action="append", dest="captions", metavar="FIELD[+FIELD]",
        help="fields that make a caption; repeat for several, which training mixes",
    )  # fmt: skip
    stored.add_argument("--upscale", action="store_true", help="enlarge images that are too small")
    stored.add_argument(
        "--mirror", action="store_true",
        help="store mirror images too: training shows half of the images mirrored, unless the "
        "caption says left or right",
    )  # fmt: skip
    form = stored.add_mutually_exclusive_group()
    form.add_argument(
        "--one-draw", dest="posterior", action="store_const", const="draw",
        help="store one draw from the VAE's posterior, not its mean and deviation: half the bytes",
    )  # fmt: skip
    form.add_argument(
        "--pixels", dest="posterior", action="store_const", const="pixels",
        help="store the images; training encodes them itself",
    )  # fmt: skip
    stored.add_argument("--text", action="store_true", help="store the captions' embeddings too")
    stored.add_argument(
        "--long-captions", metavar="POLICY",
        help="how stored embeddings handle captions that are too long: "
        f"{listed(POLICIES)} (default sentences)",
    )  # fmt: skip
    stored.add_argument(
        "--held-out", type=number, metavar="SHARE", help="share for validation (default 0.002)"
    )
    filters = p.add_argument_group("what is left out (counted, with reasons, in OUT/report.jsonl)")
    filters.add_argument(
        "--min-side", type=whole, metavar="PIXELS", help="least length of the shorter side"
    )
    filters.add_argument(
        "--max-aspect", type=number, metavar="RATIO", help="longer side over shorter (default 4)"
    )
    filters.add_argument(
        "--min-words", type=whole, metavar="N", help="least words of every caption"
    )
    filters.add_argument("--max-words", type=whole, metavar="N", help="most words of every caption")
    filters.add_argument("--max-nsfw", type=number, metavar="SCORE", help="greatest NSFW score")
    filters.add_argument(
        "--min-similarity", type=number, metavar="SCORE", help="least score of caption to image"
    )
    filters.add_argument(
        "--keep-duplicates", action="store_true", help="keep files with the same bytes"
    )


def _prepare(o: argparse.Namespace) -> None:
    require("koala prepare", "train", "pyarrow")
    from koala.data.prepare import check, preparation_of, prepare

    given = {name: getattr(o, name) for name in (*PREPARATION, *FILTERS)}
    preparation = preparation_of(o.source, given)
    how = o.workers, o.device, o.sheet, o.kind, preparation
    if o.base or o.vae or o.teacher_lora:
        check(o.source, o.out, o.model, *how)  # before the model is put together
    report = prepare(o.source, o.out, _with_parts(o, "--model", o.model), *how)
    show(o, asdict(report), "\n".join(report.lines()))


def _with_parts(o: argparse.Namespace, option: str, model: str | None) -> str | None:
    """The model that the option names, put together with the parts that others name."""
    if model is not None:
        return assembled(o, model)
    if o.base or o.vae or o.teacher_lora:
        raise UserError(f"--base, --vae and --teacher-lora are parts for a model: give {option}")
    return None


def _distill_arguments(p: Parser) -> None:
    p.add_argument("name", nargs="?", metavar="recipe", help=", ".join(recipes.NAMES))
    p.add_argument(
        "--recipe", type=Path, metavar="FILE",
        help="in place of a name: a Python file whose recipe() returns one of your own",
    )  # fmt: skip
    p.add_argument(
        "--teacher", metavar="MODEL",
        help="name, folder, file or Hub id of the model to learn from (default: the recipe's)",
    )  # fmt: skip
    p.add_argument(
        "--student", metavar="MODEL",
        help="a distilled model to continue from (default: the teacher, cut)",
    )  # fmt: skip
    _training_arguments(p, "--teacher", "the model ends in OUT/model")


def _finetune_arguments(p: Parser) -> None:
    p.add_argument(
        "recipe", help="full: the whole U-Net; lora: a LoRA, on a data set; dreambooth: a LoRA, on "
        "about ten pictures of a subject",
    )  # fmt: skip
    p.add_argument(
        "--model", metavar="MODEL",
        help="bundled name, folder, file or Hub id; with --dry-run also an architecture",
    )  # fmt: skip
    _training_arguments(p, "--model", "the result ends in OUT/model, or OUT/lora")


def _training_arguments(p: Parser, model: str, result: str) -> None:
    """What both trainings take; model: the option that names the one with parts of others."""
    p.add_argument(
        "--data", metavar="DIR", help="a folder that koala prepare made, or a URL of one"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help=f"the run's folder; {result}")
    p.add_argument("--device", help="cpu or cuda (default: the best available)")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="override settings of the recipe, such as training.batch=64 hardware.accumulate=4; "
        "hardware.* may also change when a run resumes; `--set help` lists them all",
    )  # fmt: skip
    p.add_argument(
        "--log", nargs="+", action="extend", default=[], metavar="LOGGER",
        help=f"log to {listed(LOGGERS)} as well",
    )  # fmt: skip
    p.add_parts(model)
    p.add_push()
    p.add_json("the result's folder, or with --dry-run recipe and cost,")
    dry = p.add_argument_group("dry run")
    dry.add_argument(
        "--dry-run", action="store_true",
        help="only print the recipe and what it costs: memory by part, samples per second, days",
    )  # fmt: skip
    dry.add_argument(
        "--card",
        help=f"for this GPU: {', '.join(GPUS)}, or its bf16 rate and memory as in "
        "35TFLOP,16GB (default: measure this machine)",
    )
    dry.add_argument("--gpus", type=whole, metavar="N", help="for this many (default 1)")


def _distill(o: argparse.Namespace) -> None:
    require("koala distill", "train", "pyarrow")
    from koala.recipes.validation import check

    if (o.name is None) == (o.recipe is None):
        raise UserError(
            "give a recipe: a name, or --recipe FILE for one of your own; koala distill --help "
            "lists the names"
        )
    own = None if o.recipe is None else recipes.from_file(o.recipe)
    chosen = o.name if own is None else own.recipe
    if _explain(o, recipes.configured(chosen)):
        return
    recipe = recipes.configured(chosen, o.set)
    if o.dry_run:
        _dry_run(o, recipe, "--teacher", o.teacher)
        return
    _check_run(o, "distill")
    check(recipe, o.data, o.teacher, o.student, o.device, o.log)
    check_push(o)
    teacher = _with_parts(o, "--teacher", o.teacher)
    from koala.recipes.train import distill  # all is checked: now torch may load

    model = distill(own or o.name, o.data, o.out, teacher, o.device, o.set, o.log, o.student)
    if first_process():
        show(o, {"model": str(model)}, f"finished model: {model}")
        push(o, model)


def _finetune(o: argparse.Namespace) -> None:
    require("koala finetune", "train", "pyarrow")
    from koala.recipes.recipe import Finetune
    from koala.recipes.validation import check_finetune

    if _explain(o, recipes.get(o.recipe, recipes.FINETUNES)):
        return
    recipe = recipes.configured(o.recipe, o.set, recipes.FINETUNES)
    assert isinstance(recipe, Finetune)
    if o.model is None:
        raise UserError(
            "koala finetune needs --model: the model to train further, or with --dry-run an "
            "architecture, such as koala-700m"
        )
    if o.dry_run:
        _dry_run(o, recipe, "--model", o.model)
        return
    _check_run(o, "finetune")
    check_finetune(recipe, o.model, o.data, o.device, o.log)
    check_push(o)
    model = assembled(o, o.model)
    from koala.recipes.train import finetune  # all is checked: now torch may load

    result = finetune(o.recipe, model, o.data, o.out, o.device, o.set, o.log)
    if first_process():
        what = "LoRA" if recipe.lora else "model"
        show(o, {what.lower(): str(result)}, f"finished {what}: {result}")
        push(o, result)


def _explain(o: argparse.Namespace, recipe: recipes.Recipe) -> bool:
    """Prints what each setting means, if --set asks for help; whether it did."""
    if o.set != ["help"]:
        return False
    from koala.recipes.meanings import as_json, explained

    show(o, as_json(recipe), explained(recipe))
    return True


def _dry_run(o: argparse.Namespace, recipe: recipes.Recipe, option: str, model: str | None) -> None:
    """Prints recipe and cost; model: what the option names."""
    from koala.recipes.validation import check_dry_run

    gpus = 1 if o.gpus is None else o.gpus
    check_dry_run(recipe, gpus, o.card, o.device, o.data)
    model = _with_parts(o, option, model)
    from koala.recipes.cost import dry_run  # all is checked: now torch may load

    found = dry_run(
        recipe, teacher=model, data=o.data, card=o.card, processes=gpus, device=o.device
    )
    show(o, found.as_dict(), found.text())


def _check_run(o: argparse.Namespace, command: str) -> None:
    """UserError for what a run lacks, or what only a dry run takes."""
    for name in ("card", "gpus"):
        if getattr(o, name) is not None:
            raise UserError(f"--{name} is for --dry-run; leave it out")
    for name in ("data", "out"):
        if getattr(o, name) is None:
            raise UserError(f"koala {command} needs --{name} (only --dry-run goes without)")


def _runs_arguments(p: Parser) -> None:
    p.add_argument("folder", help="the --out of a training, or a folder with several")
    p.add_argument(
        "--plot", type=Path, metavar="FILE", help="a PNG with losses and speed of all runs"
    )
    p.add_json("the runs")


def _runs(o: argparse.Namespace) -> None:
    from koala.recipes import runs

    found = runs.list_runs(o.folder)
    if o.plot is not None:
        runs.plot(o.folder, o.plot)
    show(o, runs.as_json(found), runs.table(found))


PREPARE = Command(
    "prepare",
    "encode captioned images into latents to train on",
    (
        "koala prepare path/to/images --model sdxl.safetensors --out data",
        "koala prepare path/to/images --model sdxl.safetensors --size 512 --text --out data-512",
        "koala prepare illustrations-small --model koala-mini --out illustrations",
    ),
    _prepare_arguments,
    _prepare,
)
DISTILL = Command(
    "distill",
    "train a model by a recipe; run it again to resume",
    (
        "koala distill koala-lightning-700m --teacher sdxl.safetensors --data data "
        "--out runs/koala",
        "koala distill koala-lightning-700m --dry-run --card a100 --gpus 4",
        "koala distill koala-turbo-700m --teacher sdxl.safetensors --data data-512 "
        "--out runs/turbo --set hardware.accumulate=4",
    ),
    _distill_arguments,
    _distill,
)
FINETUNE = Command(
    "finetune",
    "train a model further on your own images, whole or as a LoRA; run it again to resume",
    (
        "koala finetune dreambooth --model etri-vilab/koala-700m --data fox --out runs/fox",
        "koala finetune lora --model sdxl.safetensors --data style --out runs/style",
        "koala finetune full --model koala-700m --dry-run --card 4090",
    ),
    _finetune_arguments,
    _finetune,
)
RUNS = Command(
    "runs",
    "list trainings with their losses, speed and time left; plot them",
    ("koala runs runs --plot runs.png", "koala runs runs/koala --json"),
    _runs_arguments,
    _runs,
)
