"""Model folders by anybody: what is wrong with one is told in a line, at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koala.checkpoints import schema
from koala.checkpoints.convert import convert
from koala.checkpoints.inspect import inspect
from koala.checkpoints.tensors import read_header
from koala.cli import main
from koala.errors import UserError
from koala.generation import load
from koala.generation.decode import load_tiny
from toy import toy_tiny

FILES = [path for path in schema.SCHEMAS if path != "words.json"]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([10**6, 10**9, 10**30, -1]),
    st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=5), st.just({}), st.just([]),
    st.lists(st.one_of(st.integers(-1, 10**8), st.text(max_size=3), st.none()), max_size=4),
    st.sampled_from(["gelu", "sdpa", "org/kernel", "UNetMidBlock2D", [[1, 1], [2]], {"a": [1]}]),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(toy_sdxl, tmp_path_factory):
    copy = tmp_path_factory.mktemp("hostile") / "toy"
    shutil.copytree(toy_sdxl, copy)
    toy_tiny().save_pretrained(copy / "vae_tiny")
    return copy


def change(folder: Path, path: str, key: str, value: object) -> None:
    config = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps({**config, key: value}))


def write_header(file: Path, names: list[str]) -> None:
    """Weights of many tensors without a value."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, entry)).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.fixture
def own(folder, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "toy"))


@given(data=st.data(), path=st.sampled_from(FILES), value=ODD)
@settings(max_examples=25, deadline=None)
def test_a_config_with_any_value_is_refused_in_one_line_or_draws(folder, data, path, value):
    before = (folder / path).read_bytes()
    known = sorted({*schema.SCHEMAS[path], *json.loads(before)})
    key = data.draw(st.sampled_from(known))
    try:
        change(folder, path, key, value)
        said = fault(folder)
    finally:
        (folder / path).write_bytes(before)
    assert "\n" not in said and len(said) < 2000


def fault(folder: Path) -> str:
    """What is wrong with a model, or "" if it draws."""
    try:
        inspect(folder)
        load(folder, "cpu")("a fox", steps=1, size="16x16")
        load_tiny(folder)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("unet/config.json", "transformer_layers_per_block", [1, 1, 10**8]),
        ("unet/config.json", "block_out_channels", 5),
        ("unet/config.json", "block_out_channels", [16, 33, 32]),
        ("unet/config.json", "attention_head_dim", 0),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "act_fn", "gelu"),
        ("vae/config.json", "layers_per_block", 10**6),
        ("vae_tiny/config.json", "num_decoder_blocks", [1, 1, 1]),
        ("vae_tiny/config.json", "upsampling_scaling_factor", 10**6),
        ("vae/config.json", "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("vae/config.json", "scaling_factor", float("nan")),
        ("text_encoder/config.json", "num_hidden_layers", 10**6),
        ("text_encoder/config.json", "hidden_size", "16"),
        ("text_encoder/config.json", "num_attention_heads", 3),
        ("text_encoder/config.json", "eos_token_id", None),
        ("text_encoder_2/config.json", "_attn_implementation", "someone/kernel"),
        ("text_encoder_2/config.json", "quantization_config", {"quant_method": "x"}),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "beta_start", "0.1"),
        ("scheduler/scheduler_config.json", "_koala_sampling", {"steps": 4, "eval": "x"}),
        ("model_index.json", "force_zeros_for_empty_prompt", "no"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(own, path, key, value):
    change(own, path, key, value)
    with pytest.raises(UserError) as caught:
        inspect(own)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 1000
    assert key in said or "channels" in said or "heads" in said


def test_a_front_matter_that_refers_to_itself_is_refused(own):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    text = "\n".join(["---", *lines, "license: *a9", "---", ""])
    (own / "README.md").write_text(text)
    for work in (
        lambda: inspect(own),
        lambda: convert(own, "single-file", own.with_name("x.safetensors")),
    ):
        with pytest.raises(UserError, match="it refers to parts of itself"):
            work()
    (own / "README.md").write_text(f"---\nlicense: {'x' * 300_000}\n---\n")
    with pytest.raises(UserError, match="has 300,009 characters, allowed are 200,000"):
        inspect(own)
    (own / "README.md").write_text("---\nlicense: mit\n---\n")
    assert inspect(own).licence == "mit"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("path", ["tokenizer/x.txt", "unet/extra.json", "LICENSE", "README.md"])
def test_what_is_no_file_is_refused_and_not_waited_for(own, path):
    (own / path).unlink(missing_ok=True)
    os.mkfifo(own / path)
    with pytest.raises(UserError, match="is no file, or a link to none"):
        inspect(own)


def test_links_out_of_the_folder_are_not_followed(own, tmp_path):
    """But those of the Hub's cache are, and those to a file of the same name."""
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (own / "tokenizer" / "x.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"x.txt is a link out of the model's folder"):
        inspect(own)
    (own / "tokenizer" / "x.txt").unlink()
    cache = tmp_path / "models--org--name"
    version = Path(shutil.copytree(own, cache / "snapshots" / "0123"))
    (cache / "blobs").mkdir()
    shutil.move(version / "unet" / "config.json", cache / "blobs" / "ab12")
    (version / "unet" / "config.json").symlink_to("../../../blobs/ab12")
    assert inspect(version).kind == inspect(own).kind
    (own / "vae" / "config.json").unlink()
    (own / "vae" / "config.json").symlink_to(version / "vae" / "config.json")
    assert inspect(own).kind == inspect(version).kind


def test_a_header_of_very_many_tensors_is_refused(tmp_path):
    file = tmp_path / "many.safetensors"
    write_header(file, [f"t{i}" for i in range(60_000)])
    with pytest.raises(UserError, match="60,000 tensors, more than the limit of 50,000"):
        read_header(file)


ALIASES = "\n".join(
    ["---", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    + ["license: *a9", "---", ""]
)
HUGE = [
    ("unet/config.json", "transformer_layers_per_block", [1, 1, 10**8]),
    ("vae/config.json", "layers_per_block", 10**6),
    ("text_encoder/config.json", "num_hidden_layers", 10**6),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
    ("unet/config.json", "block_out_channels", 5),
    ("text_encoder/config.json", "hidden_size", "16"),
]
LIMITED = """
import io, json, sys, time
from contextlib import redirect_stderr
from koala.cli import main

told, before = [], 0.0
for folder in sys.argv[1:]:
    said = io.StringIO()
    with redirect_stderr(said):
        status = main(["inspect", folder])
    now = time.process_time()
    told.append([status, said.getvalue(), now - before])
    before = now
peak = next(row for row in open("/proc/self/status") if row.startswith("VmHWM:"))
print(json.dumps([told, int(peak.split()[1])]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_each_bad_folder_is_refused_in_a_line_in_5_s_and_500_mb(folder, tmp_path):
    """Seconds of the processor, so that a busy machine is none the wiser."""
    bad = []
    for i, spoiling in enumerate([*HUGE, "aliases", "FIFO", 200_000, 49_000]):
        bad.append(Path(shutil.copytree(folder, tmp_path / f"{i}")))
        weights = bad[-1] / "unet" / "diffusion_pytorch_model.safetensors"
        match spoiling:
            case "aliases":
                (bad[-1] / "README.md").write_text(ALIASES)
            case "FIFO":
                os.mkfifo(bad[-1] / "tokenizer" / "x.txt")
            case int():
                write_header(weights, [f"{'a.' * 60}{i}" for i in range(spoiling)])
            case path, key, value:
                change(bad[-1], path, key, value)
    command = [sys.executable, "-c", LIMITED, *map(str, bad)]
    told, peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for status, said, seconds in told:
        assert status == 2 and said.startswith("koala: ") and said.count("\n") == 1, said
        assert seconds < 5, said
    assert peak < 500 * 1024  # KB


def test_a_stray_adapters_config_changes_nothing(own):
    before = load(own, "cpu")("a fox", steps=1, seed=1, size="64x64").images[0].tobytes()
    for part in ("text_encoder", "text_encoder_2", "unet"):
        (own / part / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    assert load(own, "cpu")("a fox", steps=1, seed=1, size="64x64").images[0].tobytes() == before


def test_control_characters_in_a_file_never_reach_the_terminal(own, tmp_path, capsys):
    header = json.dumps({"__metadata__": {"\x1b[2Jkey": "\x1b[31mvalue"}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    main(["inspect", str(file)])
    change(own, "unet/config.json", "act_fn", "\x1b[31m")
    assert main(["inspect", str(own)]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "x1b[2Jkey" in out
