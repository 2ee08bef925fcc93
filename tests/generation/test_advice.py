"""The ladder of a model: what it foretells without torch is what the memory planner finds."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from koala.architectures.layout import parameters
from koala.architectures.table import get
from koala.checkpoints.resolve import read_model, resolve_model
from koala.cli import command_named, main
from koala.generation import advice
from koala.generation.advice import advise, narrowed, rungs
from koala.generation.memory.estimate import PLACES, TEXT, UNET, VAE, peak, weights
from koala.generation.memory.plan import GIB, Mode, Planner
from koala.lora.names import base_of
from toy_lora import toy_lora


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(resolve_model("koala-mini"), torch.device("cuda"), (128, 128))


@pytest.fixture(scope="module")
def shapes() -> dict:
    contents = read_model("koala-mini")
    parts = {**advice._COMPONENTS, UNET: ("unet",)}
    found = {part: advice._shapes(contents, names) for part, names in parts.items()}
    found[UNET] = {name.removeprefix("unet."): shape for name, shape in found[UNET].items()}
    return found


@pytest.mark.parametrize("quantised", [None, "int8", "int4"])
def test_weights_are_counted_as_the_planner_counts_them(planner, shapes, quantised):
    plan = planner.plan(Mode("fp16", "fp16", quantised))
    found = {part: weights(part, shapes[part], quantised)[0] for part in (TEXT, UNET, VAE)}
    assert found[UNET] == plan.parts[UNET] and found[VAE] == plan.parts[VAE]
    # The encoders' position ids are in no file.
    assert 0 <= plan.parts[TEXT] - found[TEXT] <= 1024


@pytest.mark.parametrize("quantised", [None, "int8"])
@pytest.mark.parametrize(("place", "decode"), PLACES)
def test_a_peak_is_the_planner_s(planner, shapes, quantised, place, decode):
    plan = planner.plan(Mode("fp16", "fp16", quantised, place, decode))
    encode, denoise, decoding = (phase.activations for phase in plan.phases)
    work = {"encode": encode, "denoise": denoise, decode: decoding}
    found = peak(shapes, work, quantised, place, decode)
    assert found.bytes == pytest.approx(plan.peak, rel=0.02)


def test_a_larger_budget_takes_a_faster_mode_and_a_smaller_model_less():
    parts = {TEXT: {"embeddings.x": (8, 8)}, VAE: {"a": (8, 8)}}
    ladder = {room: list(rungs("m", get("sdxl"), parts, room)) for room in (3 * GIB, 8 * GIB)}
    small, large = ladder.values()
    assert [rung.way for rung in small] == [rung.way for rung in large]
    for one, other in zip(small, large, strict=True):
        assert one.memory <= 3 * GIB or not one.fits
        assert one.memory <= other.memory <= 8 * GIB and other.fits
    whole, eight, four, pruned, *students = large
    assert whole.memory > eight.memory > four.memory
    assert whole.disk > pruned.disk > students[0].disk > students[1].disk
    assert whole.arithmetic == 1 > pruned.arithmetic > students[-1].arithmetic
    assert whole.loses == "nothing" and all("R@5" in r.loses or "not" in r.loses for r in large[1:])


@pytest.mark.parametrize("name", ["sdxl", "koala-700m", "sdxl-mini"])
def test_a_narrowed_u_net_has_the_share_asked_for(name):
    arch = get(name)
    assert 0.72 < parameters(narrowed(arch, 0.2)) / parameters(arch) <= 0.8


def test_a_model_that_cannot_be_cut_has_no_students():
    ways = [rung.way for rung in advise("koala-mini")]
    assert ways == ["as it is, fp16", "8 bits", "4 bits", "pruned by 20%"]


def test_the_command_prints_the_ladder_without_torch():
    code = (
        "import sys; from koala.cli import command_named, main\n"
        "status = main(['compress', 'koala-mini', '--advise', '--vram', '8', '--json'])\n"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    assert printed[0]["loses"] == "nothing" and printed[0]["memory"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--advise", "--out", "x"], "--out has no effect on --advise"),
        (["--advise", "--vram", "-1"], "vram is -1"),
        (["--advise", "--base", "koala-mini"], "koala-mini is a complete model"),
        (["--to", "koala-1b", "--vram", "8", "--out", "x"], "--vram is for --advise"),
        (["--to", "koala-1b"], "needs --out DIR"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message, capsys):
    assert main(["compress", "koala-mini", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_text_says_what_is_planned_and_what_is_not(capsys):
    assert main(["compress", "koala-mini", "--advise", "--vram", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("koala-mini, 128x128 pixels\n")
    assert "not planned" in printed and "speed is not measured" in printed
    assert "1024" not in printed


def test_the_commands_run_as_printed_with_all_parts(toy_sdxl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = shutil.copytree(toy_sdxl / "unet", tmp_path / "my unet")
    lora = toy_lora(tmp_path / "style.safetensors", base_of(toy_sdxl))
    ladder = advise(alone, None, str(toy_sdxl), str(toy_sdxl / "vae"), [f"{lora}:0.5"])
    commands = [shlex.split(rung.command)[1:] for rung in ladder]
    assert [command[0] for command in commands] == ["generate"] * 3 + ["compress"] * 4
    for name, *arguments in commands:
        command_named(name).parse(arguments)
        assert {str(alone), str(toy_sdxl), f"{lora}:0.5"} <= {*arguments}
    assert main(commands[0]) == main(commands[-1]) == 0
