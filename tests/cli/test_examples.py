"""Every example of `--help`, typed in: what is told there works."""

import shlex
import shutil
from pathlib import Path

import pytest

from koala.checkpoints.convert import convert
from koala.cli import COMMANDS, command_named, main
from koala.lora.names import base_of
from toy_family import untrained_teacher
from toy_lora import toy_lora
from toy_sources import images, write_folder

# What needs more than a desk has: GPUs, hours, or packages that are fetched. Their pages' commands
# are rehearsed in tests/serving, tests/data, tests/recipes, tests/evaluation, tests/benchmark,
# test_control, test_image_prompt and test_export.
ELSEWHERE = ("koala export", "koala serve", "koala prepare illustrations-small", "koala evaluate",
             "koala benchmark koala-lightning-700m", "koala finetune dreambooth",
             "koala finetune lora", 'koala generate "a lighthouse" --model my-koala',
             'koala generate "in the snow" --model my-koala')  # fmt: skip
SMALLER = {  # what makes the others a matter of seconds
    "prepare": ["--size", "64", "--held-out", "0.3", "--workers", "1"],
    "distill": [
        "--set", "training.samples=8", "training.batch=4", "training.validate_every=8",
        "prompts=a fox", "pixels=64", "hardware.compile=",
    ],
    # Each way to draw is a process that imports torch; tests/benchmark tries them all.
    "benchmark": ["--rounds", "1", "--threads", "1", "--backend", "torch"],
}  # fmt: skip
ORDER = ("generate", "inspect", "compress", "convert", "export", "architectures", "prepare",
         "distill", "finetune", "runs", "evaluate", "benchmark", "serve")  # fmt: skip


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """What the examples name: an SDXL as a single file, here `sdxl-mini`, a LoRA, images."""
    model = tmp_path / "model"
    untrained_teacher(model)
    convert(model, "single-file", tmp_path / "sdxl.safetensors")
    toy_lora(tmp_path / "style.safetensors", base_of(model))
    shutil.rmtree(model)
    write_folder(tmp_path / "path" / "to" / "images", images(24, [(70, 70)]))
    (tmp_path / "prompts.txt").write_text("a fox\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_examples_work_in_their_order(desk, capsys):
    assert set(ORDER) == set(COMMANDS)
    examples = [example for name in ORDER for example in command_named(name).examples]
    done = [example for example in examples if not example.startswith(ELSEWHERE)]
    assert len(done) == 25
    for example in done:
        name, *given = shlex.split(example)[1:]
        if "--dry-run" not in given:
            if name == "prepare" and "--size" in given:
                del given[given.index("--size") : given.index("--size") + 2]
            given += SMALLER.get(name, [])
        assert main([name, *given]) == 0, (example, capsys.readouterr().err)
    for made in ("fox.png", "owl.png", "runs/student", "student.safetensors", "runs/smaller",
                 "student-style.safetensors", "data/index.arrow", "runs/koala/model",
                 "runs/turbo/model", "benchmark-mini/benchmark.json"):  # fmt: skip
        assert (desk / made).exists(), made
    assert len(list((desk / "drawn").glob("*.png"))) == 8
