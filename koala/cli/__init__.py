"""The command line: parse, call, print. Each command imports what it needs when it runs.

Exit status: 0 done, 1 failed, 2 bad input (one line on standard error, no traceback).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from koala import __version__, recipes
from koala.errors import FailedElsewhere, Failure, UserError
from koala.recipes.gpus import CARDS
from koala.serving.settings import Limits, Options, data_folder, limits_of

if TYPE_CHECKING:
    from koala.generation import Pipeline


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.run
    try:
        command(options)
    except UserError as error:
        return _complain(error, 2)
    except FailedElsewhere:  # another process of the run says why
        return 1
    except (Failure, OSError, MemoryError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 1)
    return 0


def _complain(what: object, status: int) -> int:
    print("koala: " + " ".join(str(what).split()), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="koala",
        description="Text-to-image models of SDXL's class, made small and fast.",
        epilog="koala COMMAND --help explains a command, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"koala {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _generate,
        _serve,
        _architectures,
        _inspect,
        _compress,
        _convert,
        _prepare,
        _distill,
        _evaluate,
        _benchmark,
    ):
        add(commands)
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    does: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=does, description=does[0].upper() + does[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="upload the result to the Hugging Face Hub"
    )


def _check_push(o: argparse.Namespace) -> None:
    """Before the work: whether the Hub would take its result."""
    if o.push_to_hub is not None:
        from koala.checkpoints.upload import check_target

        check_target(o.push_to_hub)


def _push(o: argparse.Namespace, result: Path) -> None:
    if o.push_to_hub is not None:
        from koala.checkpoints.upload import push

        print(f"uploaded: {push(result, o.push_to_hub)}", file=sys.stderr)


# --- generate -------------------------------------------------------------------------------


def _generate(commands) -> None:
    p = _command(
        commands, "generate", _run_generate, "draw pictures from words",
        'koala generate "a red fox, flat twemoji style" -n 4 --seed 7',
    )  # fmt: skip
    p.add_argument("prompt", nargs="+", help="what to draw; several prompts, several pictures")
    p.add_argument("--model", default="koala-mini", help="name, folder, Hub id or single file")
    p.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA for the model or for SDXL, its teacher; may be given several times",
    )  # fmt: skip
    p.add_argument("--steps", type=int, default=10, help="denoising steps (default 10)")
    p.add_argument("--guidance", type=float, default=3.5, help="guidance (CFG; default 3.5)")
    p.add_argument(
        "--guidance-until", type=float, default=1.0, metavar="SHARE",
        help="leave guidance out after this share of the steps (default 1.0, none)",
    )  # fmt: skip
    p.add_argument(
        "--scheduler", default="euler", help="euler (default), euler-a, dpm++2m, ddim or lcm"
    )
    p.add_argument("--negative", default="", help="what to keep away from")
    p.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: the model's own)")
    p.add_argument("-n", "--number", type=int, default=1, help="pictures a prompt (default 1)")
    p.add_argument("--seed", type=int, help="seed of the first picture (default: at random)")
    p.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from")
    p.add_argument(
        "--strength", type=float,
        help="how much of it is drawn anew, above 0 and up to 1 (default 0.6)",
    )  # fmt: skip
    p.add_argument(
        "--mask", type=Path, metavar="FILE",
        help="draw anew only where this picture, of the same size, is light",
    )  # fmt: skip
    p.add_argument(
        "--strict", action="store_true", help="each picture bit for bit as if drawn alone"
    )
    p.add_argument("--out", type=Path, default=Path("pictures"), help="folder (default pictures)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    p.add_argument(
        "--backend", help="torch, openvino, or auto: measure once which is faster and remember it "
        "(default: what is remembered, else torch); or torch-bf16, openvino-bf16, openvino-int8, "
        "which round, or fastest: measure these too",
    )  # fmt: skip
    p.add_argument("--compile", action="store_true", help="compile the model, kept in the cache")
    p.add_argument("--graphs", action="store_true", help="replay steps from CUDA graphs")
    p.add_argument(
        "--vram", metavar="GIB",
        help="plan to stay within so many GiB of memory, or within what is free ('free')",
    )  # fmt: skip
    p.add_argument("--weights", help="fp32, fp16, bf16, int8 or fp8 (default: the plan's choice)")
    p.add_argument("--decode", help="full, tiled or tiny (default: the plan's choice)")
    p.add_argument("--tiny-vae", help="folder or Hub id of the tiny decoder (default: the model's)")
    p.add_argument("--json", action="store_true", help="print paths and settings as JSON")


def _run_generate(o: argparse.Namespace) -> None:
    from koala.generation import check_writable, load, save, validation
    from koala.generation.runtime.backends import equip
    from koala.utils.progress import progress

    def say(line: str) -> None:
        print(f"koala: {line}", file=sys.stderr)

    check_writable(o.out, len(o.prompt) * o.number)
    planned = any((o.vram, o.weights, o.decode, o.tiny_vae))
    if planned:
        pipeline = _planned(o, say)
    else:
        pipeline = load(o.model, o.device)
        for file, scale in validation.loras(o.lora).items():
            say(pipeline.add_lora(file, scale, merged=True).line())
    requests = pipeline.requests(
        o.prompt, negative_prompt=o.negative, steps=o.steps, guidance=o.guidance,
        guidance_until=o.guidance_until, scheduler=o.scheduler, size=o.size, number=o.number,
        seed=o.seed, image=o.image, strength=o.strength, mask=o.mask,
    )  # fmt: skip
    if not planned:
        equip(pipeline, o.backend, o.compile, o.graphs, say)
    with progress("drawing", pipeline.steps(requests), "steps") as advance:
        result = pipeline.draw(requests, strict=o.strict, on_step=lambda *_: advance(1))
    paths = save(result, o.out)
    if o.json:
        made = zip(paths, result.settings, strict=True)
        print(json.dumps([{"path": str(p), **asdict(s)} for p, s in made], indent=1))
    else:
        for path, settings in zip(paths, result.settings, strict=True):
            print(f"{path}  seed {settings.seed}")


def _planned(o: argparse.Namespace, say: Callable[[str], None]) -> "Pipeline":
    """A pipeline that draws by a memory plan, which is printed."""
    from koala.generation import validation
    from koala.generation.image_files import open_picture
    from koala.generation.memory.placement import load_within

    for option in ("backend", "compile", "graphs"):
        if getattr(o, option):
            raise UserError(
                f"--{option} has no effect under a memory plan: leave it out, or --vram, "
                "--weights, --decode and --tiny-vae"
            )
    size = open_picture(o.image).size if o.image and not o.size else o.size
    pipeline, plan = load_within(
        o.model, o.device, o.vram or "free", size=size, pictures=len(o.prompt) * o.number,
        weights=o.weights, decode=o.decode, tiny=o.tiny_vae, lora=validation.loras(o.lora),
        given=o.image is not None, say=say,
    )  # fmt: skip
    print(plan.table(), file=sys.stderr)
    return pipeline


# --- serve ----------------------------------------------------------------------------------


def _serve(commands) -> None:
    p = _command(
        commands, "serve", _run_serve, "answer requests for pictures over HTTP, with a page",
        "koala serve --model koala-mini --port 8000",
    )  # fmt: skip
    usual = Limits()
    p.add_argument("--model", default="koala-mini", help="name, folder, Hub id or single file")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help="one key a line, asked of all")
    p.add_argument(
        "--data", type=Path, metavar="DIR",
        help="where pictures and jobs are kept (default: $KOALA_DATA, or ~/.local/share/koala)",
    )  # fmt: skip
    p.add_argument("--lora-dir", type=Path, metavar="DIR", help="LoRAs that requests may name")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    p.add_argument("--backend", help="torch, openvino or auto, as in koala generate")
    p.add_argument("--compile", action="store_true", help="compile the model, kept in the cache")
    p.add_argument("--graphs", action="store_true", help="replay steps from CUDA graphs")
    p.add_argument("--vram", metavar="GIB", help="plan to stay within so many GiB, or 'free'")
    p.add_argument(
        "--replicas", metavar="N or N-M",
        help="so many engines over Ray Serve, more while pictures queue; each has a GPU or a core",
    )  # fmt: skip
    limits = p.add_argument_group("limits")
    limits.add_argument(
        "--max-batch", type=int, metavar="N", help="pictures in one pass (default: measured)"
    )
    limits.add_argument(
        "--max-size", metavar="WIDTHxHEIGHT",
        help="the most pixels of a picture (default: four times the model's own)",
    )  # fmt: skip
    for name, says, kind in (
        ("queue", "pictures that wait or are drawn", int),
        ("client-queue", "of one client", int),
        ("rate", "requests a minute of one client, 0: any number", float),
        ("burst", "of them at once", int),
        ("drain", "seconds that pictures under way have at SIGTERM", float),
    ):
        default = getattr(usual, name.replace("-", "_"))
        limits.add_argument(
            f"--{name}", type=kind, default=default, help=f"{says} (default {default:g})"
        )
    gallery = p.add_argument_group("gallery")
    gallery.add_argument("--gallery-gib", type=float, default=4.0, help="most GiB (default 4)")
    gallery.add_argument("--gallery-days", type=float, default=30.0, help="most days (default 30)")


def _run_serve(o: argparse.Namespace) -> None:
    from koala.serving import serve

    limits = limits_of(
        o.max_size, max_batch=o.max_batch, queue=o.queue, client_queue=o.client_queue,
        rate=o.rate, burst=o.burst, drain=o.drain,
    )  # fmt: skip
    options = Options(
        model=o.model, host=o.host, port=o.port, api_key_file=o.api_key_file, device=o.device,
        backend=o.backend, vram=o.vram, compile=o.compile, graphs=o.graphs, lora_dir=o.lora_dir,
        data=o.data or data_folder(), gallery_bytes=int(o.gallery_gib * 2**30),
        gallery_days=o.gallery_days, limits=limits,
    )  # fmt: skip

    def say(line: str) -> None:
        print(f"koala: {line}", file=sys.stderr, flush=True)

    if o.replicas is None:
        serve(options, say)
    else:
        from koala.serving.ray import scaleout

        scaleout.serve(options, scaleout.Scale.parse(o.replicas), say)


# --- architectures --------------------------------------------------------------------------


def _architectures(commands) -> None:
    p = _command(
        commands, "architectures", _run_architectures, "compare the U-Nets, computed from their "
        "definitions", "koala architectures",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print the rows as JSON")


def _run_architectures(o: argparse.Namespace) -> None:
    from koala.architectures.flops import format_table, table

    rows = table()
    print(json.dumps(rows, indent=1) if o.json else format_table(rows))


# --- inspect --------------------------------------------------------------------------------


def _inspect(commands) -> None:
    p = _command(
        commands, "inspect", _run_inspect, "say what a weights file or a model is, without "
        "loading it", "koala inspect sdxl-finetune.safetensors",
    )  # fmt: skip
    p.add_argument("model", help="a .safetensors file, bundled name, folder or Hub id")
    p.add_argument("--json", action="store_true", help="print the answer as JSON")


def _run_inspect(o: argparse.Namespace) -> None:
    from koala.checkpoints.inspect import inspect

    found = inspect(o.model)
    print(json.dumps(asdict(found), indent=1) if o.json else found.text())


# --- compress -------------------------------------------------------------------------------


def _compress(commands) -> None:
    p = _command(
        commands, "compress", _run_compress, "cut a student out of an SDXL teacher, with its "
        "weights", "koala compress runs/sdxl-mini/model --to koala-700m --out runs/student",
    )  # fmt: skip
    p.add_argument("teacher", help="name, folder, Hub id or single file of an SDXL pipeline")
    p.add_argument(
        "--to", required=True,
        help="koala-700m, koala-1b, bk-sdxl, or transformer depths of your own, such as 0,2,4 or "
        "0,2,4,no-mid",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help="the student's folder")
    p.add_argument("--dtype", help="of all weights: fp32, fp16, bf16 (default: as found)")
    p.add_argument("--depth-rule", default="bottom", help="bottom (default), interleave or up")
    _add_push(p)
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _run_compress(o: argparse.Namespace) -> None:
    from koala.checkpoints.compress import compress

    _check_push(o)
    report = compress(o.teacher, o.to, o.out, o.dtype, o.depth_rule)
    _push(o, report.out)
    if o.json:
        print(json.dumps(asdict(report), default=str))
        return
    print(
        f"{report.teacher} ({report.teacher_parameters:,} parameters) -> "
        f"{report.student} ({report.student_parameters:,}): {report.inherited} tensors "
        f"inherited, {report.dropped} left behind, {report.bytes / 1e6:,.1f} MB in {report.out}"
    )


# --- convert --------------------------------------------------------------------------------


def _convert(commands) -> None:
    p = _command(
        commands, "convert", _run_convert, "write a model in another format or dtype",
        "koala convert runs/student --to single-file --dtype fp16 --out student.safetensors",
    )  # fmt: skip
    p.add_argument("model", help="name, folder, Hub id or single file; with --for a LoRA's file")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", help="diffusers (a folder) or single-file (for other programs)")
    what.add_argument(
        "--for", dest="student", metavar="MODEL",
        help="make SDXL's LoRA one for this student: koala-700m, koala-1b, bk-sdxl or a model",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help="the folder or the .safetensors file")
    p.add_argument("--dtype", help="of all weights: fp32, fp16, bf16 (default: as found)")
    _add_push(p)
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _run_convert(o: argparse.Namespace) -> None:
    from koala.checkpoints.convert import ConvertReport, convert
    from koala.lora.conversion import convert_lora
    from koala.lora.reading import Report

    _check_push(o)
    report: ConvertReport | Report
    if o.student is None:
        report = convert(o.model, o.to, o.out, o.dtype)
    elif o.dtype is None:
        report = convert_lora(o.model, o.student, o.out)
    else:
        raise UserError("--dtype has no effect on a LoRA, which keeps its own: leave it out")
    _push(o, o.out.expanduser())
    if o.json:
        print(json.dumps(asdict(report), default=str))
    else:
        print(report.line())


# --- prepare --------------------------------------------------------------------------------


def _prepare(commands) -> None:
    p = _command(
        commands, "prepare", _run_prepare, "make captioned pictures into latents to train on",
        "koala prepare path/to/pictures --model path/to/sdxl --out data --size 512",
    )  # fmt: skip
    p.add_argument(
        "source", help="a folder of pictures, webdataset tars, parquet files or ye-pop chunks; or "
        "illustrations or illustrations-small",
    )  # fmt: skip
    p.add_argument("--as", dest="kind", help="folder, webdataset, parquet, ye-pop: what it is")
    p.add_argument("--out", type=Path, required=True, help="folder; run again to go on")
    p.add_argument("--model", help="whose VAE encodes: name, folder or Hub id")
    p.add_argument("--workers", type=int, help="processes that read (default: every core)")
    p.add_argument("--device", help="that encodes: cpu, cuda (default: the best there is)")
    p.add_argument("--sheet", type=Path, help="a contact sheet of illustrations, a PNG")
    p.add_argument("--json", action="store_true", help="print what came of it as JSON")
    made = p.add_argument_group("what is made")
    made.add_argument("--size", type=int, help="pixels of the square bucket (default 1024)")
    made.add_argument(
        "--caption", action="append", dest="captions", metavar="FIELD[+FIELD]",
        help="fields that make a caption; may be given several times, to mix in training",
    )  # fmt: skip
    made.add_argument("--upscale", action="store_true", help="enlarge small pictures")
    made.add_argument(
        "--mirror", action="store_true",
        help="store mirror images too: half of what a training shows, save where a caption says "
        "left or right",
    )  # fmt: skip
    stored = made.add_mutually_exclusive_group()
    stored.add_argument("--one-draw", action="store_true", help="store a draw: half the bytes")
    stored.add_argument(
        "--pixels", action="store_true", help="store the pictures: a training encodes them itself"
    )
    made.add_argument("--text", action="store_true", help="store the caption's embeddings too")
    made.add_argument("--long-captions", help="in embeddings: sentences (default) or chunks")
    made.add_argument("--held-out", type=float, help="share for validation (default 0.002)")
    filters = p.add_argument_group("what is left out (each counted in OUT/report.jsonl)")
    filters.add_argument("--min-side", type=int, help="least pixels of the shorter side")
    filters.add_argument("--max-aspect", type=float, help="longer over shorter (default 4)")
    filters.add_argument("--min-words", type=int, help="of every caption")
    filters.add_argument("--max-words", type=int, help="of every caption")
    filters.add_argument("--max-nsfw", type=float, help="greatest NSFW score")
    filters.add_argument("--min-similarity", type=float, help="least score of caption to picture")
    filters.add_argument("--keep-duplicates", action="store_true", help="of the same bytes")


def _run_prepare(o: argparse.Namespace) -> None:
    from koala.data.prepare import ILLUSTRATIONS, prepare
    from koala.data.preprocess import Filters, Preparation

    def given(*names: str) -> dict:
        values = {name: getattr(o, name) for name in names}
        return {n: v for n, v in values.items() if v is not None and v is not False}

    filters = given(
        "min_side", "max_aspect", "min_words", "max_words", "max_nsfw", "min_similarity",
        "keep_duplicates",
    )  # fmt: skip
    settings = given("size", "upscale", "mirror", "text", "long_captions", "held_out")
    settings |= {"filters": Filters(**filters)} if filters else {}
    settings |= {"captions": tuple(o.captions)} if o.captions else {}
    settings |= {"posterior": "draw"} if o.one_draw else {}
    settings |= {"posterior": "pixels"} if o.pixels else {}
    if settings and o.source in ILLUSTRATIONS:
        settings.setdefault("size", ILLUSTRATIONS[o.source].size)
    preparation = Preparation(**settings) if settings else None
    report = prepare(o.source, o.out, o.model, o.workers, o.device, o.sheet, o.kind, preparation)
    if o.json:
        print(json.dumps(asdict(report), default=str))
        return
    for line in report.lines():
        print(line)


# --- distill --------------------------------------------------------------------------------


def _distill(commands) -> None:
    p = _command(
        commands, "distill", _run_distill, "train by a recipe; run again to go on",
        "koala distill koala-lightning-700m --data laion-pop --out runs/koala",
    )  # fmt: skip
    p.add_argument("recipe", help=", ".join(recipes.NAMES))
    p.add_argument(
        "--teacher",
        help="name, folder, file or Hub id of the model to learn from (default: the recipe's)",
    )
    p.add_argument(
        "--student",
        help="name, folder, file or Hub id of a distilled model to go on from (default: the "
        "teacher, cut)",
    )
    p.add_argument("--data", help="a folder that `koala prepare` made, or a URL of one")
    p.add_argument("--out", type=Path, help="the run's folder; the finished model in OUT/model")
    p.add_argument("--device", help="cpu, cuda (default: the best there is)")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="settings in place of the recipe's, as training.batch=64 hardware.accumulate=4; "
        "those of hardware change the result by rounding alone, also when a run goes on",
    )  # fmt: skip
    p.add_argument(
        "--log", nargs="+", action="extend", default=[], metavar="BOARD",
        help="also log to tensorboard, wandb",
    )  # fmt: skip
    _add_push(p)
    p.add_argument(
        "--dry-run", action="store_true",
        help="only say what is trained and what it costs: memory by part, samples a second, days",
    )  # fmt: skip
    p.add_argument(
        "--card", help=f"with --dry-run: {', '.join(CARDS)} (default: measure the one here)"
    )
    p.add_argument("--gpus", type=int, help="with --dry-run: how many (default 1)")
    p.add_argument("--json", action="store_true", help="with --dry-run: recipe and cost as JSON")


def _run_distill(o: argparse.Namespace) -> None:
    recipes.get(o.recipe)  # an unknown one is refused at once
    if o.dry_run:
        _dry_run(o)
        return
    for name in ("card", "gpus", "json"):
        if getattr(o, name):
            raise UserError(f"--{name} is for --dry-run; leave it out")
    from koala.recipes.run import distill

    for name in ("data", "out"):
        if getattr(o, name) is None:
            raise UserError(f"koala distill needs --{name} (only --dry-run goes without)")
    _check_push(o)
    model = distill(o.recipe, o.data, o.out, o.teacher, o.device, o.set, o.log, o.student)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one speaks
        print(f"finished model: {model}")
        _push(o, model)


def _dry_run(o: argparse.Namespace) -> None:
    from koala.recipes import configured
    from koala.recipes.cost import estimate
    from koala.recipes.recipe import ALONE, described

    recipe = configured(o.recipe, o.set)
    gpus = 1 if o.gpus is None else o.gpus
    cost = (
        None
        if isinstance(recipe, ALONE)
        else estimate(
            recipe, teacher=o.teacher, data=o.data, card=o.card, processes=gpus, device=o.device
        )
    )
    if o.json:
        shown = {**described(recipe), **({"cost": cost.as_dict()} if cost else {})}
        print(json.dumps(shown, indent=2))
        return
    print(json.dumps(described(recipe), indent=2))
    print(cost.text() if cost else "(what this recipe costs is not reckoned: it has no U-Net)")


# --- evaluate -------------------------------------------------------------------------------


def _evaluate(commands) -> None:
    p = _command(
        commands, "evaluate", _run_evaluate, "measure models against held-out pictures",
        "koala evaluate koala-mini teacher=runs/sdxl-mini/model --pictures data --out report",
    )  # fmt: skip
    p.add_argument("model", nargs="+", help="MODEL or NAME=MODEL, a row of the report each")
    p.add_argument("--pictures", type=Path, required=True, help="folder of `koala prepare`")
    p.add_argument("--out", type=Path, required=True, help="folder of the report")
    p.add_argument("--prompts", type=int, default=200, help="held-out pairs (default 200)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    p.add_argument("--steps", type=int, default=10, help="denoising steps (default 10)")
    p.add_argument("--guidance", type=float, default=3.5, help="guidance (CFG; default 3.5)")
    p.add_argument("--judge", type=Path, help="judge.safetensors of an earlier report")
    p.add_argument("--card", action="store_true", help="also enter the row in each model's card")
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _run_evaluate(o: argparse.Namespace) -> None:
    from koala.evaluation.cards import check_cards, enter
    from koala.evaluation.report import evaluate

    models = {}
    for given in o.model:
        name, _, model = given.rpartition("=")
        if (name or model) in models:
            raise UserError(f"two models are called {name or model!r}: name one NAME=MODEL")
        models[name or model] = model
    if o.card:
        check_cards(models)
    report = evaluate(
        models, o.pictures, o.out, o.prompts, o.seeds, o.steps, o.guidance, judge=o.judge
    )
    if o.card:
        enter(report, models)
    print(json.dumps(report.as_dict(), indent=1) if o.json else report.table())


# --- benchmark ------------------------------------------------------------------------------


def _benchmark(commands) -> None:
    p = _command(
        commands, "benchmark", _run_benchmark, "measure latency and memory beside stock diffusers",
        "koala benchmark koala-mini --out benchmark",
    )  # fmt: skip
    p.add_argument(
        "model", nargs="*",
        help="bundled name, folder or Hub id, or a row of the published table, such as "
        "koala-lightning-700m, with random weights (default: the whole table)",
    )  # fmt: skip
    p.add_argument("--out", type=Path, default=Path("benchmark"), help="new folder (benchmark)")
    p.add_argument("--runs", type=int, default=5, help="pictures timed of each (default 5)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    p.add_argument("--dtype", help="fp32, fp16 or bf16 (default: fp32 on a processor, else fp16)")
    p.add_argument("--backend", help="of ours, on a processor: as in koala generate")
    p.add_argument("--compile", action="store_true", help="ours compiled")
    p.add_argument("--graphs", action="store_true", help="ours replayed from CUDA graphs")
    p.add_argument("--seconds", type=float, help="begin no further model after so many")
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _run_benchmark(o: argparse.Namespace) -> None:
    from koala.benchmark.run import benchmark

    def told(row) -> None:
        cells = row.cells()
        print(f"{row.name}  {row.engine}  {cells['picture s']} s", file=sys.stderr)

    report = benchmark(
        o.model, o.out, o.device, o.dtype, o.runs, o.backend, o.compile, o.graphs, o.seconds, told
    )
    print(json.dumps(report.as_dict(), indent=1) if o.json else report.table())
