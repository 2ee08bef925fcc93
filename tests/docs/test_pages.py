"""The pages' commands, run in order at toy size: what a reader is told to type works."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun

from koala import recipes
from koala.checkpoints.convert import convert
from koala.cli import command_named, main
from koala.data.illustrations.scenes import ILLUSTRATIONS
from koala.generation import read_settings
from koala.lora.names import base_named
from koala.recipes.overrides import overridden
from toy_controlnet import saved, toy_controlnet
from toy_family import untrained_teacher
from toy_ip_adapter import toy_image_encoder, toy_ip_adapter
from toy_lora import toy_lora
from toy_packages import TOY
from toy_sources import images, write_yepop

DOCS = Path(__file__).parents[2] / "docs"


def commands_of(page: str | Path, program: bool = False) -> list[list[str]]:
    """The arguments of every command on the page, in order; after the `program` they are given."""
    return commands_in((DOCS / page).read_text(), program)


def commands_in(text: str, program: bool = False) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[0 if program else 1 :] for line in lines]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A reader's folder: a fine-tune as a single file, here `sdxl-mini`, and what is for it."""
    model = tmp_path / "model"
    unet = untrained_teacher(model)
    convert(model, "single-file", tmp_path / "my-sdxl.safetensors")
    toy_lora(tmp_path / "my-style.safetensors", base_named(str(model)))
    saved(toy_controlnet(unet), tmp_path / "canny-sdxl")
    Image.new("RGB", (128, 128)).save(tmp_path / "edges.png")
    toy_ip_adapter(unet, tmp_path / "ip-adapter_sdxl_vit-h.safetensors")
    toy_image_encoder(tmp_path / "image_encoder")
    Image.new("RGB", (160, 128), "orange").save(tmp_path / "fox.png")
    shutil.rmtree(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_readmes_chain(packages, tmp_path, monkeypatch):
    """From the bundled teacher to a report on its student, with toy packages and few samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        ILLUSTRATIONS, "illustrations-small", replace(TOY, scenes=20, icons=10, size=128)
    )
    chain = (DOCS.parent / "README.md").read_text().split("## The whole chain")[1]
    install, *commands = commands_in(chain.split("\n## ")[0], program=True)
    assert install == ["pip", "install", "-e", ".[evaluate]"]
    smaller = {
        "prepare": ["--workers", "1"],
        "distill": ["training.batch=4", "prompts=a fox"],
        "evaluate": ["--count", "3", "--steps", "1"],
    }
    for _, verb, *given in commands:
        given = [part.replace("training.samples=4096", "training.samples=8") for part in given]
        assert main([verb, *given, *smaller.get(verb, [])]) == 0, verb
    rows = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["real pictures", "sdxl-mini", "cut", "distilled"]
    assert "distilled" in (tmp_path / "runs" / "report" / "report.md").read_text()


def test_your_own_sdxl(desk, capsys):
    commands = commands_of("your-own-sdxl.md")
    assert len(commands) == 14
    Path("prompts.txt").write_text("a fox\n")
    for command in commands:
        if command[0] == "distill":
            recipes.get(command[1])  # weeks on a GPU: that there is such a recipe is all for here
        elif any("sdxl_lightning" in part for part in command):
            continue  # a model of parts: tests/lora/test_assembly.py
        elif command[0] != "prepare":  # pictures of one's own: test_data's matter
            assert main(command) == 0, (command, capsys.readouterr().err)
    written = {p.name for p in desk.iterdir()}
    assert {"runs", "my-koala.safetensors", "my-style-koala.safetensors", "pictures"} <= written
    assert "inherited" in capsys.readouterr().out
    first, second, third = sorted((desk / "pictures").glob("*.png"))
    with Image.open(first) as image:
        assert "<lora:my-style:0.8>" in image.info["parameters"]
    assert read_settings(second).control == "canny-sdxl"
    assert read_settings(third).ip_adapter == "ip-adapter_sdxl_vit-h"


def test_training(toy_sdxl, tmp_path, monkeypatch, capsys):
    """Every command of docs/training.md, with a toy teacher and few samples in the paper's run."""
    monkeypatch.chdir(tmp_path)
    write_yepop(tmp_path / "ye-pop", images(24, [(70, 70)]))
    small = [
        "training.samples=8", "training.batch=4", "training.validate_every=8", "pixels=64",
        "hardware.compile=", "hardware.accumulate=2", "prompts=a fox",
    ]  # fmt: skip
    seen = []
    for command in commands_of("training.md", program=True):
        if command[0] in ("pip", "python"):  # the benchmark is rehearsed in test_benchmark
            continue
        program, *given = [part.replace("path/to/ye-pop", "ye-pop") for part in command]
        seen.append(" ".join(command[:2]))
        if "prepare" in given:
            given[given.index("--model") + 1] = str(toy_sdxl)
            given += ["--size", "64", "--held-out", "0.3", "--workers", "1"]
        elif "--dry-run" not in given and "runs" not in given:
            wanted = [part for part in small if not part.startswith(names_set(given))]
            given += [] if "--set" in given else ["--set"]
            given += [*wanted, "--teacher", str(toy_sdxl)]
            given = [part.replace("training.batch=64", "training.batch=4") for part in given]
            given[given.index("--out") + 1] += str(len(seen))  # a run of its own
        if program == "koala":
            assert main(given) == 0, (command, capsys.readouterr().err)
        elif "--nnodes" in given:  # one machine cannot play eight
            assert torchrun().parse_args(given).training_script == "koala"
        else:
            given[given.index("4")] = "2"
            done = [sys.executable, "-m", "torch.distributed.run", "--standalone", *given]
            subprocess.run(done, check=True)
    assert seen.count("koala distill") == 4 and len(seen) == 8
    models = {path.parent.name for path in tmp_path.glob("runs/*/model")}
    assert models == {"koala3", "koala4", "sa-normalised6", "second7"}
    assert (tmp_path / "runs/koala4/validation.jsonl").is_file()


def test_the_papers_choices_can_each_be_put_to_another_value():
    page = (DOCS / "training.md").read_text()
    table = page.split("What the paper prints")[1].split("\n## ")[0]
    paper = recipes.get("koala-lightning-700m")
    given = re.findall(r"`--set ([\w.]+)=([^`]+)`", table)
    assert len(given) == 6
    for name, value in given:
        assert overridden(paper, [f"{name}={value.replace('...', '2')}"]) != paper


def test_memory(tmp_path, monkeypatch, capsys):
    """docs/memory.md, where models of the Hub give way to the bundled one; its table's recipe is
    run in test_tiny."""
    monkeypatch.chdir(tmp_path)
    drawn = 0
    for command in commands_of("memory.md"):
        if command[0] == "distill" or "runs/tiny/model" in command:
            continue
        given = [part for part in command if part not in ("--model", "--tiny-vae")]
        given = [part for part in given if not part.startswith(("etri-vilab/", "madebyollin/"))]
        assert main(given) == 0, (command, capsys.readouterr().err)
        drawn += 1
    assert drawn == len([*tmp_path.rglob("*.png")]) == 5
    (python,) = re.findall(r"```python\n(.*?)```", (DOCS / "memory.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(python, "memory.md", "exec"), names)
    assert names["image"].size == (128, 128) and names["pipeline"].plan.peak <= 4 * 2**30


def test_the_pages_commands_are_commands():
    """Each `koala ...` line of every page is understood; pages without one are named here."""
    without = set()
    for page in [Path("README.md"), *sorted(DOCS.glob("*.md"))]:
        commands = [
            c[1:] for c in commands_of(DOCS.parent / page, program=True) if c[:1] == ["koala"]
        ]
        if not commands:
            without.add(page.name)
        for name, *arguments in commands:
            command_named(name).parse(arguments)
    assert without == {"architecture.md", "extend.md"}


def names_set(given: list[str]) -> tuple[str, ...]:
    """The settings that a command replaces itself, "" where there are none."""
    if "--set" not in given:
        return ()
    after = given[given.index("--set") + 1 :]
    return tuple(f"{part.partition('=')[0]}=" for part in after)


def test_the_readmes_speed_is_the_records():
    records = DOCS.parent / "benchmarks"
    rows = json.loads((records / "cpu" / "mini" / "benchmark.json").read_text())["rows"]
    (koala,) = (row for row in rows if (row["way"], row["threads"]) == ("koala", 2))
    faster = "{median:.2f} ({low:.2f} to {high:.2f})".format(**koala["times_faster"])
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert f"takes {koala['image']['median']:.3f} s, {faster} times as fast as with" in readme
    latency = json.loads((records / "mini_latency.json").read_text())
    few, tiny = latency["times faster"].values()
    assert f"koala-mini-guided is {few} times as fast again" in readme
    page = " ".join((DOCS / "few-steps.md").read_text().split())
    full, small = (latency["models"][f"koala-mini-guided{name}"] for name in ("", ", tiny decoder"))
    assert f"takes {full['image_s']:.3f} s instead of" in page
    assert f"With the tiny decoder (`--decode tiny`) it takes {small['image_s']:.3f} s" in page
    assert f"{tiny} times as fast as koala-mini" in page


def test_what_scoring_takes_is_the_record():
    record = json.loads((DOCS.parent / "benchmarks" / "evaluating.json").read_text())
    page = " ".join((DOCS / "evaluation.md").read_text().split())
    assert f"took {record['scoring_over_drawing']:.2f} times as long as drawing them" in page
    assert record["scoring_over_drawing"] <= record["bound"]


def test_the_table_of_guided_distillation_is_the_report():
    report = json.loads((DOCS / "evaluation" / "bundled.json").read_text())
    page = (DOCS / "few-steps.md").read_text()
    for row in report["rows"][1:]:
        shown = [
            f"{cell['value']:.{digits}f} ({cell['low']:.{digits}f} to {cell['high']:.{digits}f})"
            for cell, digits in (
                (row["cells"]["illustrations fd-efflite0"], 2),
                (row["cells"]["illustrations r@5"], 3),
            )
        ]
        steps = report["settings"]["steps"][row["name"]]
        guidance = report["settings"]["guidance"][row["name"]]
        told, passes = ("none", steps) if guidance == 1 else (f"{guidance:g}", 2 * steps)
        cells = [row["name"], str(steps), told, str(passes), *shown]
        assert f"| {' | '.join(cells)} |" in page
    verdicts = {
        each["column"].split()[-1]: each["verdict"]
        for each in report["comparisons"]
        if (each["first"], each["second"]) == ("koala-mini", "koala-mini-guided")
    }
    fd, r5, r1 = (verdicts[name] for name in ("fd-efflite0", "r@5", "r@1"))
    assert {fd["says"], r5["says"], r1["says"]} == {"cannot be told"}
    for verdict, digits in ((fd, 2), (r5, 3), (r1, 3)):
        for value in verdict["difference"].values():
            assert f"{abs(value):.{digits}f}" in page
