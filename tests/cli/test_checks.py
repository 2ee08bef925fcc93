"""A mistake is told before anything heavy is loaded, and what is nearly a name is asked for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from toy_sources import images, write_folder

HEAVY = ("torch", "diffusers", "transformers")
GENERATE = ["generate", "a fox"]
MISTAKES: tuple[tuple[list[str], str], ...] = (
    ([], "no command given; koala --help lists them"),
    (["genrate", "a fox"], "unknown command 'genrate': .*; did you mean generate?"),
    (["--hlep"], "unknown command '--hlep'"),
    # what argparse finds
    ([*GENERATE, "--negatve", "blue"], "does not take '--negatve'.*; did you mean --negative?"),
    ([*GENERATE, "--steps", "many"], "--steps: 'many' is not a whole number; see koala generate"),
    ([*GENERATE, "--guidance", "3,5"], "--guidance: '3,5' is not a number; write 3.5"),
    ([*GENERATE, "--guidance=\u22121"], "is not a number; write -1"),
    ([*GENERATE, "--strength", "60%"], "--strength: '60%' is not a number; write 0.6"),
    ([*GENERATE, "--seed", "1e3"], "--seed: '1e3' is not a whole number; write 1000"),
    ([*GENERATE, "--seed", "42,43"], "--seed: '42,43' is not a whole number; see koala generate"),
    ([*GENERATE, "--steps", "4.5"], "--steps: '4.5' is not a whole number; see koala generate"),
    ([*GENERATE, "--seed", "-1"], "seed is -1: allowed .*; without a seed it is random"),
    (["generate", "prompts.txt"], "is a file here, .*: draw its lines by --prompts prompts.txt"),
    (["generate", "--prompts", "none.txt"], "none.txt is no file: give a text with a prompt"),
    (["generate", "--list-words", "--prompts", "prompts.txt"], "leave out --prompts prompts.txt"),
    (["distill", "koala-mini", "--dry-run", "--set", "batch=8"], "write training.batch=8"),
    (["distill", "koala-mini", "--dry-run", "--card", "RTX 4095"], "unknown card 'RTX 4095'"),
    ([*GENERATE, "--image", "https://a.b/c.png"], "https://a.b/c.png is an address"),
    ([*GENERATE, "--size", "16:9"], "size '16:9' is a shape, and not WIDTHxHEIGHT"),
    ([*GENERATE, "--size", "72 \u00d7 70"], "size 72x70: allowed are multiples of 8"),
    (["compress", "koala-mini"], "one of the arguments --to --prune --advise is required"),
    (["compress", "koala-mini", "--to", "koala-700m"], "--out"),
    (["compress", "koala-mini", "--prune", "0.2", "--out", "x"],
     "--prune needs --calibrate: a text file"),
    (["compress", "koala-mini", "--prune", "0.2", "--calibrate", "gone", "--out", "x"],
     "gone is no file: give a text with a prompt a line"),
    (["compress", "koala-mini", "--prune", "20", "--calibrate", "prompts", "--out", "x"],
     "--prune 20.0: allowed are 0.01 to 0.6"),
    (["compress", "koala-mini", "--prune", "0.2", "--depth-rule", "up", "--out", "x"],
     "--depth-rule has no effect on --prune"),
    (["compress", "koala-mini", "--to", "koala-1b", "--calibrate", "prompts", "--out", "x"],
     "--calibrate is for --prune"),
    (["convert", "x", "--to", "diffusers", "--for", "x", "--out", "y"], "--for: not allowed with"),
    (["convert", "koala-mini", "--to", "diffusers", "--calibrate", "prompts", "--out", "x"],
     "--calibrate is for --weights int4: leave it out"),
    (["convert", "koala-mini", "--to", "diffusers", "--weights", "int4", "--calibrate", "gone",
      "--out", "x"], "gone is no file: give a text"),
    # generate
    (["generate"], "no prompt: say what to draw"),
    ([*GENERATE, "--list-words"], "--list-words draws nothing: leave out the prompt 'a fox'"),
    (["generate", "--list-words", "--model", "koala-mni"], "unknown model 'koala-mni'"),
    ([*GENERATE, "--size", "70x64"], "size 70x64: allowed are multiples of 8"),
    ([*GENERATE, "--steps", "0"], "steps is 0: allowed are whole numbers from 1 to 1000"),
    ([*GENERATE, "--scheduler", "lcm", "--steps", "51"], "takes 1 to 50"),
    ([*GENERATE, "--scheduler", "eular"], "unknown scheduler 'eular': .*; did you mean euler?"),
    ([*GENERATE, "--model", "koala-mni"], "unknown model 'koala-mni': .*; did you mean koala-mini"),
    ([*GENERATE, "--model", "gone.safetensors"], "model gone.safetensors does not exist"),
    ([*GENERATE, "--lora", "gone.safetensors:0,8"], "LoRA scale is '0,8'"),
    ([*GENERATE, "--lora", "gone.safetensors:200"], "LoRA scale is 200.0"),
    ([*GENERATE, "--lora", "gone.safetensors"], "gone.safetensors cannot be read"),
    ([*GENERATE, "--image", "gone.png"], "gone.png cannot be read as an image"),
    ([*GENERATE, "--image", "black.png", "--mask", "black.png"], "the mask is dark everywhere"),
    ([*GENERATE, "--control-image", "black.png"], "a control image has no effect without"),
    ([*GENERATE, "--control", "gone"], "a ControlNet needs a control image"),
    ([*GENERATE, "--control", "gone", "--control-image", "black.png"], "ControlNet gone does not"),
    ([*GENERATE, "--control", "gone", "--graphs"], "plain PyTorch: it does not go with --graphs"),
    ([*GENERATE, "--control", "gone", "--backend", "openvino"], "go with --backend openvino"),
    ([*GENERATE, "--control", "gone", "--vram", "4"], "go with a memory plan"),
    ([*GENERATE, "--ip-image", "black.png"], "an image prompt has no effect without"),
    ([*GENERATE, "--ip-adapter", "gone"], "an IP-Adapter needs an image"),
    ([*GENERATE, "--ip-adapter", "gone:3", "--ip-image", "black.png"], "IP-Adapter scale is 3.0"),
    ([*GENERATE, "--ip-adapter", "gone.bin:x", "--ip-image", "black.png"],
     "IP-Adapter scale is 'x'"),
    ([*GENERATE, "--ip-adapter", "gone", "--ip-image", "black.png"], "IP-Adapter gone does not"),
    ([*GENERATE, "--ip-adapter", "gone", "--compile"], "--ip-adapter needs plain PyTorch"),
    ([*GENERATE, "--ip-adapter", "gone", "--backend", "openvino"], "go with --backend openvino"),
    ([*GENERATE, "--ip-adapter", "gone", "--weights", "int8"], "go with a memory plan"),
    ([*GENERATE, "--backend", "openvion"], "unknown backend 'openvion': .* mean openvino?"),
    ([*GENERATE, "--weights", "fp61"], "unknown weights 'fp61': .*; did you mean fp16?"),
    ([*GENERATE, "--weights", "int4", "--backend", "openvino"], "--to openvino --dtype int4"),
    ([*GENERATE, "--decode", "tild"], "unknown decoder 'tild': .*; did you mean tiled?"),
    ([*GENERATE, "--vram", "lots"], "vram is 'lots'"),
    ([*GENERATE, "--vram", "4", "--compile"], "--compile has no effect under a memory plan"),
    ([*GENERATE, "--graphs", "--backend", "openvino"], "--graphs is PyTorch's"),
    ([*GENERATE, "--device", "cudda"], "unknown device 'cudda': .*; did you mean cuda?"),
    ([*GENERATE, "--out", "fox.jpg"], "fox.jpg: pictures are written as PNG; name it fox.png"),
    ([*GENERATE, "--out", "black.png"], "black.png exists; name another file"),
    ([*GENERATE, "--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
    # before a model is put together
    ([*GENERATE, "--steps", "0", "--model", "gone", "--base", "gone"], "steps is 0"),
    (["generate", " ", "--model", "gone", "--vae", "gone"], "the prompt is empty"),
    (["generate", "a <lora:x", "--model", "gone", "--base", "gone", "--size", "9x9"], "size 9x9"),
    (["compress", "gone", "--base", "gone", "--to", "koala-1b", "--out", "x", "--dtype", "fp61"],
     "mean fp16?"),
    (["convert", "gone", "--base", "gone", "--to", "single-file", "--out", "x"], "must end in"),
    (["convert", "gone", "--base", "gone", "--to", "diffusers", "--out", "x"], "unknown model"),
    (["prepare", "gone", "--base", "gone", "--model", "gone", "--out", "x"],
     "source 'gone' does not exist"),
    (["prepare", "images", "--base", "gone", "--model", "gone", "--out", "x", "--size", "9"],
     "size 9: it must be a multiple of 8"),
    (["prepare", "images", "--base", "gone", "--model", "gone", "--out", "x", "--text",
      "--long-captions", "cut"], "unknown policy for long captions 'cut'"),
    (["prepare", "images", "--vae", "gone", "--model", "gone", "--out", "x", "--caption", "title"],
     "the source has no title"),
    (["prepare", "images", "--vae", "gone", "--model", "gone", "--out", "made"],
     "made was made with size=64, now it is 1024"),
    (["prepare", "illustrations", "--vae", "gone", "--model", "gone", "--out", "x", "--text"],
     "has fixed settings"),
    (["prepare", "images", "--base", "gone", "--model", "gone", "--out", "x"], "unknown model"),
    # serve
    (["serve", "--model", "koala-mni"], "did you mean koala-mini?"),
    (["serve", "--backend", "atuo"], "unknown backend 'atuo'"),
    (["serve", "--replicas", "4-1"], "--replicas '4-1'"),
    (["serve", "--replicas", "2", "--api-key-file", "gone"], "key file gone cannot be read"),
    ([*GENERATE, "--lora-dir", "gone"], "--lora-dir gone is not a folder"),
    (["serve", "--lora-dir", "gone"], "--lora-dir gone is not a folder"),
    (["serve", "--port", "70000"], "port 70000"),
    # models
    (["inspect", "koala-mni"], "did you mean koala-mini?"),
    (["inspect", "gone.safetensors"], "gone.safetensors does not exist"),
    (["compress", "koala-mni", "--to", "koala-700m", "--out", "x"], "did you mean koala-mini?"),
    (["compress", "org/name", "--to", "koala-700", "--out", "x"], "did you mean koala-700m?"),
    (["compress", "org/name", "--to", "koala-1b", "--out", "x", "--depth-rule", "botom"],
     "unknown depth rule 'botom': .*; did you mean bottom?"),
    (["convert", "org/name", "--to", "difusers", "--out", "x"], "did you mean diffusers?"),
    (["convert", "org/name", "--to", "diffusers", "--dtype", "fp61", "--out", "x"], "mean fp16?"),
    (["convert", "koala-mini", "--to", "onnx", "--out", "x"], "use koala export --to onnx"),
    (["export", "koala-mini", "--to", "onx", "--out", "x"], "unknown format 'onx': .* mean onnx?"),
    (["export", "koala-mini", "--to", "coreml", "--out", "x"], "run on Apple's systems alone"),
    (["export", "koala-mini", "--to", "gguf", "--out", "x"], "must end in .gguf, not x"),
    (["export", "koala-mini", "--to", "onnx", "--dtype", "bf16", "--out", "x"], "in fp32, fp16"),
    (["export", "koala-mni", "--to", "openvino", "--out", "x"], "did you mean koala-mini?"),
    (["convert", "gone.safetensors", "--for", "koala-700", "--out", "x"], "unknown model"),
    # training
    (["prepare", "illustrations-smal", "--out", "x"], "did you mean illustrations-small?"),
    (["prepare", "gone", "--out", "x", "--model", "koala-mini"], "source 'gone' does not exist"),
    (["prepare", "images", "--as", "foldr", "--out", "x"], "did you mean folder?"),
    (["prepare", "images", "--model", "koala-mni", "--out", "x"], "did you mean koala-mini?"),
    (["prepare", "images", "--size", "500", "--model", "koala-mini", "--out", "x"], "size 500"),
    (["distill", "koala-minni"], "unknown recipe 'koala-minni': .*; did you mean koala-mini?"),
    (["distill", "koala-mini", "--set", "training.bacth=4"], "did you mean training.batch?"),
    (["distill", "koala-mini", "--set", "training.batch=four"], "it must be a whole number"),
    (["distill", "koala-mini", "--set", "settings.taps=xa"], "unknown tap location 'xa'"),
    (["distill", "koala-mini", "--out", "x"], "koala distill needs --data"),
    (["distill", "koala-mini", "--data", "images", "--out", "x"], "this recipe needs --teacher"),
    (["distill", "koala-mini", "--data", "gone", "--out", "x", "--teacher", "koala-mini"],
     "--data gone does not exist"),
    (["distill", "koala-mini", "--data", "images", "--out", "x", "--teacher", "koala-mni"],
     "did you mean koala-mini?"),
    (["distill", "koala-turbo-1b", "--data", "images", "--out", "x", "--log", "wandbb"],
     "unknown --log logger 'wandbb': .*; did you mean wandb?"),
    (["distill", "koala-mini", "--dry-run", "--card", "h20"], "unknown card 'h20'"),
    (["distill", "koala-mini", "--dry-run", "--gpus", "0"], "--gpus 0"),
    # measuring
    (["evaluate", "a=x", "a=y", "--pictures", "x", "--out", "y"], "two models are named 'a'"),
    (["evaluate", "koala-mini", "--pictures", "gone", "--out", "y"], "no prompts"),
    (["evaluate", "koala-mini", "--prompts", "hpsv3", "--out", "y"], "did you mean hpsv2?"),
    (["evaluate", "koala-mini", "--prompts", "hpsv2=x", "--out", "y"], "hpsv2 is not at x"),
    (["evaluate", "a=x,", "--prompts", "x", "--out", "y"], "'a' has an empty run"),
    (["evaluate", "a", "--prompts", "x", "--out", "y", "--metrics", "pikscore"], "mean pickscore?"),
    (["evaluate", "a", "--out", "y", "--steps", "9", "b=4"], "unknown row of --steps 'b'"),
    (["evaluate", "koala-mini", "--out", "y", "--steps", "0"], "steps is 0"),
    (["benchmark", "koala-turbo-700"], "did you mean koala-turbo-700m?"),
    (["benchmark", "koala-mini", "--dtype", "fp61"], "unknown dtype 'fp61'"),
)  # fmt: skip
PROBE = """
import contextlib, io, json, sys
from koala.cli import main
told = []
for arguments in json.load(sys.stdin):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        status = main(arguments)
    loaded = [name for name in sys.argv[1:] if name in sys.modules]
    told.append((status, error.getvalue(), loaded))
json.dump(told, sys.stdout)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list:
    """What each mistake ends with, one after the other in a process that has loaded nothing."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_folder(folder / "images", images(2, [(64, 64)]))
    Image.new("L", (64, 64)).save(folder / "black.png")
    (folder / "prompts").write_text("a fox\n")
    (folder / "prompts.txt").write_text("a fox\n")
    (folder / "made").mkdir()
    (folder / "made" / "latents.json").write_text(
        '{"source": "folder", "captions": ["text"], "size": 64}'
    )
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *HEAVY], cwd=folder, check=True, capture_output=True,
        input=json.dumps([arguments for arguments, _ in MISTAKES]), text=True,
        env=environment(folder),
    )  # fmt: skip
    assert sorted(folder.rglob("*")) == before
    return json.loads(done.stdout)


def environment(folder: Path) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "KOALA_DATA": str(folder.with_name("data"))}


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=[" ".join(m) for m, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line_before_torch_is_loaded(i, told):
    status, error, loaded = told[i]
    assert status == 2
    (line,) = error.splitlines()
    assert line.startswith("koala: ")
    assert re.search(MISTAKES[i][1].replace("?", r"\?"), line), line
    assert loaded == []


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["distill", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from koala.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pyarrow', 'rich'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(Path.cwd()),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
