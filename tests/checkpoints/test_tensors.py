"""Weights files: read as safetensors reads them, written as it writes them, and never trusted."""

import errno
import json
import math
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from koala.checkpoints import tensors
from koala.checkpoints.tensors import (
    Stored,
    View,
    load_tensor,
    read,
    read_header,
    read_metadata,
    rows,
    write,
)
from koala.errors import Failure, UserError

KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def entry(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return KINDS[tensor.dtype], tuple(tensor.shape)


@pytest.fixture
def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator).half(),
        "ü": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "ids": torch.arange(6).reshape(1, 6),
    }


# --- writing and reading --------------------------------------------------------------------


def test_what_is_written_is_read_back_by_safetensors(tmp_path, some_tensors):
    file = tmp_path / "x.safetensors"
    size = write(
        file,
        {name: entry(tensor) for name, tensor in some_tensors.items()},
        lambda name: content(some_tensors[name]),
        {"licence": "ours"},
    )
    assert size == file.stat().st_size
    back = load_file(file)
    assert back.keys() == some_tensors.keys()
    for name, tensor in some_tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == read_metadata(file) == {"format": "pt", "licence": "ours"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_safetensors_writes_is_read(tmp_path, some_tensors):
    file = tmp_path / "x.safetensors"
    save_file(some_tensors, file)
    assert read_metadata(file) == {}
    header = read_header(file)
    assert header.keys() == some_tensors.keys()
    for name, tensor in some_tensors.items():
        assert (header[name].dtype, header[name].shape) == entry(tensor)
        assert read(header[name]) == content(tensor)
        loaded = load_tensor(header[name])
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    cut=st.integers(0, 9),
    piece=st.integers(1, 80),
    dtype=st.sampled_from([None, "F64", "F32", "F16", "BF16"]),
)
def test_views_and_conversion_in_pieces(tmp_path_factory, height, width, cut, piece, dtype):
    file = tmp_path_factory.mktemp("views") / "x.safetensors"
    tensor = torch.randn(height, width, generator=torch.Generator().manual_seed(height))
    save_file({"x": tensor}, file)
    x, cut = read_header(file)["x"], min(cut, height)
    upper, lower = rows(x, 0, cut), rows(x, cut, height)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_PIECE", 8 * piece)  # whole elements, as the real one
        for view, expected in (
            (View((lower, upper)), torch.cat([tensor[cut:], tensor[:cut]])),
            (View((x,), transposed=True), tensor.T),
            (View((lower,), transposed=True), tensor[cut:].T),
        ):
            loaded = load_tensor(view, dtype)
            kind = next(k for k, name in KINDS.items() if name == (dtype or "F32"))
            assert view.shape == tuple(expected.shape)
            assert torch.equal(loaded, expected.to(kind))


def test_conversion_refuses_what_does_not_fit(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.tensor([1.0, 1e9]), "i": torch.tensor([1]), "n": torch.tensor(
        [math.inf, math.nan])}, file)  # fmt: skip
    header = read_header(file)
    with pytest.raises(UserError, match="too large for F16; use fp32 or bf16"):
        write(tmp_path / "y.safetensors", {"x": ("F16", (2,))}, header.__getitem__)
    with pytest.raises(UserError, match="cannot convert I64 weights to F16"):
        read(header["i"], "F16")
    assert load_tensor(header["n"], "F16").isfinite().logical_not().all()  # as it was
    mixed = View((header["x"], header["x"]._replace(dtype="F16", size=4, shape=(2,))))
    with pytest.raises(UserError, match="F16, F32; choose one"):
        mixed.dtype  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_existing_file_survives_a_failed_write(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(3)}, file)
    before = file.read_bytes()

    def fail(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(file, {"x": ("F32", (3,))}, fail)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_full_disk_is_a_failure_with_one_line(tmp_path):
    """A limit on the size of files is what a full disk looks like to the writer."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from koala.errors import Failure\n"
        "from koala.checkpoints.tensors import write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    write(Path(sys.argv[1]), {'x': ('F32', (1 << 20,))}, lambda name: bytes(4 << 20))\n"
        "except Failure as error:\n"
        "    print(error)\n"
    )
    file = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"cannot write {file}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_names_the_output(tmp_path):
    from koala.utils.atomic import new_file

    with (
        pytest.raises(Failure, match=r"cannot write .*x: No space left.*another disk"),
        new_file(tmp_path / "x"),
        open("/dev/full", "wb") as full,
    ):
        full.write(bytes(1 << 20))
    with pytest.raises(UserError, match="Permission denied"), new_file(tmp_path / "x"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_folder_that_cannot_be_finished_is_named_and_not_its_parts(tmp_path):
    from koala.utils.atomic import new_file, new_folder

    def full() -> None:
        with new_folder(tmp_path / "x") as part, new_file(part / "weights"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Failure, match=f"^cannot write {tmp_path}/x: No space left"):
        full()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    from koala.utils.atomic import new_folder

    def interrupted() -> None:
        with new_folder(tmp_path / "x") as part:
            (part / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


# --- invalid files --------------------------------------------------------------------------


def forged(file: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return file


def tensor(shape: object = (2,), begin: object = 0, end: object = 8, dtype: object = "F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"x": tensor(shape=(-2,), end=-8)}, 0),
        ({"x": tensor(shape=(-1, -2))}, 8),
        ({"x": tensor(shape=(2.0,))}, 8),
        ({"x": tensor(shape=(True, 2))}, 8),
        ({"x": tensor(shape="2")}, 8),
        ({"x": tensor(shape=7)}, 8),
        ({"x": tensor(shape=(1 << 62, 1 << 62), end=1 << 126)}, 8),
        ({"x": tensor(shape=[1] * 1000 + [2])}, 8),
        ({"x": tensor(begin=8, end=16), "y": tensor(begin=16, end=24)}, 24),  # a gap first
        ({"x": tensor(), "y": tensor(begin=4, end=12)}, 12),  # overlap
        ({"x": tensor(), "y": tensor(begin=12, end=20)}, 20),  # a gap between
        ({"x": tensor(begin=-8, end=0)}, 8),
        ({"x": tensor(), "y": tensor()}, 8),  # twice the same bytes
        ({"x": tensor(dtype=["F32"])}, 8),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8),
        ({"x": {**tensor(), "data_offsets": [0, 8, 9]}}, 8),
        ({"x": [1, 2]}, 8),
        ({"x": None}, 8),
        (b"[]", 0),
        (b'{"x": 1', 0),
        (b'{"\\ud800": 1}', 0),
        (b'{"x":\xff}', 0),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
        (b'{"x":' + b"9" * 10_000 + b"}", 0),
        (b'{"x":{},"x":{}}', 0),
    ],
)
def test_impossible_headers(tmp_path, header, body):
    file = forged(tmp_path / "x.safetensors", header, bytes(body))
    with pytest.raises(
        UserError, match=r"x.safetensors is not a valid safetensors file: bad header"
    ) as e:
        read_header(file)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "C64"])
def test_dtypes_that_are_not_read(tmp_path, dtype):
    file = forged(tmp_path / "x.safetensors", {"x": tensor(dtype=dtype)}, bytes(8))
    with pytest.raises(
        UserError, match=rf"holds '{dtype}' tensors \(x\), which koala does not"
    ) as e:
        read_header(file)
    assert "take the model in fp16, bf16, fp32 or fp8 (F8_E4M3 or F8_E5M2)" in str(e.value)


@pytest.mark.parametrize("metadata", [[], "text", {"a": 1}, {"a": {"b": "c"}}])
def test_metadata_that_is_none(tmp_path, metadata):
    file = forged(tmp_path / "x.safetensors", {"__metadata__": metadata or ["x"]})
    with pytest.raises(UserError, match="__metadata__ must map names to text"):
        read_metadata(file)


def test_a_forged_length_costs_no_memory(tmp_path):
    file = tmp_path / "x.safetensors"
    forged(file, {}, length=2**63)
    with pytest.raises(UserError, match="truncated, or not a safetensors"):
        read_header(file)
    with file.open("r+b") as stream:  # the claim is true of this sparse file, and too long
        stream.truncate(8 << 30)
        stream.write(((8 << 30) - 8).to_bytes(8, "little"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"8,589,934,584 bytes, more than the limit of 16,777,216"):
        read_header(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page, not a model"),
        (b"<html><body>log in</body></html>", "a web page, not a model"),
        (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
        (b"\xef\xbb\xbf\r\n <!doctype html>", "a web page, not a model"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b"Entry not found", r"is text, not a safetensors file \('Entry not found'\)"),
        (b'{"error": "Invalid credentials"}', "is text, not a safetensors file"),
        (b"", "is empty, not a safetensors file: download it again"),
        (bytes(4096), "begins with zeros: an unfinished download"),
        (b"PK\x03\x04" + b"\x14\0" * 13 + b"sdxl/model_index.json{}", "an archive: unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(64), "an archive: unpack it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "an image, not a model"),
    ],
)
def test_what_people_have_under_such_a_name_is_called_by_its_own(tmp_path, content, said):
    (tmp_path / "sdxl.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_header(tmp_path / "sdxl.safetensors")


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"whatever it is, and longer than eight bytes")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"a": [1.0] * 9}, protocol=2))
    with zipfile.ZipFile(tmp_path / "torch.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    torch.save({"a": torch.ones(3)}, tmp_path / "b.bin")
    for name in ("model.ckpt", "pickle.safetensors", "torch.safetensors", "b.bin"):
        with pytest.raises(UserError, match=f"{name} is a pickle.*run code.*in a sandbox"):
            read_header(tmp_path / name)
    save_file({"x": torch.ones(1)}, tmp_path / "renamed.ckpt")
    assert list(read_header(tmp_path / "renamed.ckpt")) == ["x"]  # what it holds decides


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="is a folder: give a file"):
        read_header(tmp_path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


def test_a_file_that_shrinks_meanwhile(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000)}, file)
    x = read_header(file)["x"]
    os.truncate(file, 1000)
    with pytest.raises(UserError, match="shrank while it was read"):
        read(x)


def test_two_thousand_damages(tmp_path):
    """Truncations, flipped bits and edited headers: refused, or read without a surprise."""
    file, chance = tmp_path / "x.safetensors", random.Random(0)
    save_file(
        {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4).half(), "n": torch.ones(2, 2)},
        file,
        metadata={"modelspec.license": "none"},
    )
    whole = file.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    refused = []
    for turn in range(2000):
        damaged = bytearray(whole)
        kind = turn % 4
        if kind == 0:
            del damaged[chance.randrange(len(whole)) :]
        elif kind == 1:
            for _ in range(chance.randint(1, 3)):
                damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        elif kind == 2:
            at = chance.randrange(8, header_end)
            damaged[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
        else:
            at = chance.randrange(8, header_end)
            damaged[at : at + 1] = chance.choice(b'0123456789-[]{}",:.eE').to_bytes()
        file.write_bytes(damaged)
        try:
            header = read_header(file)
            read_metadata(file)
        except UserError as error:
            refused.append(str(error))
            continue
        assert all(isinstance(stored, Stored) for stored in header.values())
        assert sum(stored.size for stored in header.values()) < len(damaged)
        assert all(len(read(stored)) == stored.size for stored in header.values())
    assert len(refused) > 1000
    assert all(str(file) in message and "\n" not in message for message in refused)
