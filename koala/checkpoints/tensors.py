"""Safetensors files: reads headers and tensors, writes files tensor by tensor.

All access to weights goes through this module, and it holds no more than a few MiB in memory. A
tensor is a place in a file (`Stored`) or several of them joined (`View`); it is copied in pieces,
and its dtype is converted on the way. Headers are untrusted: every entry is checked before use,
and whatever is wrong with one is a `UserError` that names the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from koala.errors import UserError, unknown
from koala.utils.atomic import new_file

if TYPE_CHECKING:
    import torch

# Bytes per element of safetensors' dtypes.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that can be converted into each other
FP8 = ("F8_E4M3", "F8_E5M2")  # only read: they become `_FROM_FP8` unless another dtype is asked for
_FROM_FP8 = "F16"
# Bits of the exponent, all set in NaN and infinity, by dtype.
_EXPONENT = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # our names, and safetensors' own
_HEADER_LIMIT = 2**24  # bytes; SDXL's is 0.4 MB
_TENSORS_LIMIT = 50_000  # SDXL has 2,515, a LoRA for it some thousands
_AXES_LIMIT, _SIDE_LIMIT = 32, 2**48
_PIECE = 4 << 20  # bytes read at a time
_PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_MAGIC = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


class Stored(NamedTuple):
    """One tensor of a safetensors file: location, dtype and shape."""

    file: Path
    dtype: str  # safetensors' name, a key of DTYPE_BYTES
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    size: int  # bytes
    scale: float = 1.0  # by which its values are multiplied as they are read; fp8 only


@dataclass(frozen=True)
class View:
    """A tensor made of stored ones: joined along axis 0, then optionally transposed (2-D)."""

    parts: tuple[Stored, ...]
    transposed: bool = False

    @property
    def dtype(self) -> str:
        """safetensors' name, of what is read. Raises `UserError` if the parts have several."""
        dtypes = {_FROM_FP8 if part.dtype in FP8 else part.dtype for part in self.parts}
        if len(dtypes) > 1:
            raise UserError(
                f"{self.parts[0].file}: tensors to be joined have different dtypes, "
                f"{', '.join(sorted(dtypes))}; choose one with --dtype"
            )
        return dtypes.pop()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the joined tensor."""
        first = self.parts[0].shape
        if len(self.parts) > 1:
            first = (sum(part.shape[0] for part in self.parts), *first[1:])
        return first[::-1] if self.transposed else first


Source: TypeAlias = Stored | View | bytes  # what a tensor can be written from


def rows(stored: Stored, begin: int, end: int) -> Stored:
    """Rows `begin` to `end` of a tensor along axis 0, as a tensor of the same file."""
    assert 0 <= begin <= end <= stored.shape[0], (stored, begin, end)
    row = stored.size // stored.shape[0] if stored.shape[0] else 0
    return stored._replace(
        shape=(end - begin, *stored.shape[1:]),
        offset=stored.offset + begin * row,
        size=(end - begin) * row,
    )


def float_dtype(name: str | None) -> str | None:
    """safetensors' name for fp32, fp16 or bf16; None stays None.

    Raises `UserError` for any other name.
    """
    if name is not None and name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name] if name else None


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


# --- headers --------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header alone, in the header's order.

    Raises `UserError` if the file is not a safetensors file, is a pickle, or its tensors do not
    fill it without gaps from the header to the end, as the header says.
    """
    header, start, length = _header(file)
    header.pop("__metadata__", None)
    if len(header) > _TENSORS_LIMIT:
        raise _bad(file, f"{len(header):,} tensors, more than the limit of {_TENSORS_LIMIT:,}")
    try:
        tensors = {name: _stored(file, name, entry, start) for name, entry in header.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _bad(file, str(error)) from None
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if stored.offset != end:
            raise _bad(file, f"{name!r} overlaps its neighbour or leaves a gap")
        end += stored.size
    if length != end:
        state = "truncated" if length < end else "damaged"
        raise UserError(
            f"{file} is {state}: {length:,} bytes, its header says {end:,}; download it again"
        )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file: text by name. Raises `UserError`."""
    metadata = _header(file)[0].get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(file, "__metadata__ must map names to text")
    return metadata


def _bad(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is not a valid safetensors file: bad header ({reason[:200]})")


_PAGE = "a web page, not a model: download the file itself; its page may ask for a login"
_ARCHIVE = "an archive: unpack it, and give the .safetensors file in it"
_PICTURE = "an image, not a model"
_OTHERS = {  # how such files begin, in lower case and without white space
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull, or "
    "download the file",
    **dict.fromkeys((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"), _PAGE),
    b"gguf": "a GGUF file; koala reads safetensors: download the model in that form",
    **dict.fromkeys((b"pk\x03\x04", b"7z\xbc\xaf", b"rar!", b"\x1f\x8b"), _ARCHIVE),
    **dict.fromkeys((b"\x89png", b"\xff\xd8\xff", b"gif8", b"riff"), _PICTURE),
    b"\x89hdf": "an HDF5 file (Keras); koala reads safetensors",
}
_BEGINNING = 128  # bytes, by which other files are told


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """(the header's JSON object, offset of the first tensor, length of the file)."""
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(_BEGINNING)
            size = int.from_bytes(start[:8], "little")
            fits = length > 8 and size <= length - 8
            if start[8:9] != b"{" or not fits:
                _refuse_others(file, start)
            if not fits:
                raise UserError(
                    f"{file} has {length:,} bytes: truncated, or not a safetensors file; "
                    "download it again"
                )
            if start[8:9] != b"{":
                raise _bad(file, "it does not start with a JSON object")
            if size > _HEADER_LIMIT:
                raise _bad(file, f"{size:,} bytes, more than the limit of {_HEADER_LIMIT:,}")
            stream.seek(8)
            text = stream.read(size)
    except IsADirectoryError:
        raise UserError(
            f"{file} is a folder: give a file in it that ends in .safetensors"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_checked)
    except (ValueError, RecursionError) as error:
        raise _bad(file, str(error)) from None
    return header, 8 + size, length


def _refuse_others(file: Path, start: bytes) -> None:
    if not start:
        raise UserError(f"{file} is empty, not a safetensors file: download it again")
    if not start.strip(b"\0"):
        raise UserError(f"{file} begins with zeros: an unfinished download; download it again")
    of_torch = start.startswith(b"PK") and b"/data.pkl" in start
    pickled = of_torch or start.startswith(_PICKLE_MAGIC)
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _OTHERS.items():
        if plain.startswith(beginning) and not pickled:
            raise UserError(f"{file} is {kind}")
    if file.suffix.lower() in _PICKLE_ENDINGS or pickled:
        raise UserError(
            f"{file} is a pickle, which can run code when opened, so koala never opens it; "
            "download the model's .safetensors, or convert it in a sandbox with a tool that you "
            "trust"
        )
    if start.isascii() and start.decode().replace("\n", " ").strip().isprintable():
        words = " ".join(start.decode().split())[:40]
        raise UserError(
            f"{file} is text, not a safetensors file ({words!r}): give the model's folder or its "
            ".safetensors file; where this is a download, download it again"
        )


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for text in (text for pair in pairs for text in pair if isinstance(text, str)):
        text.encode()  # a lone surrogate could not be printed
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _stored(file: Path, name: str, entry: Any, start: int) -> Stored:
    """One entry of a header. Raises `ValueError`, `KeyError` or `TypeError` if it is invalid."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if (
        not all(type(n) is int and 0 <= n < _SIDE_LIMIT for n in numbers)
        or len(shape) > _AXES_LIMIT
    ):
        raise ValueError(f"shape or offsets of {name!r}")
    if dtype not in DTYPE_BYTES:
        raise UserError(
            f"{file} holds {str(dtype)[:20]!r} tensors ({name[:100]}), which koala does not read: "
            f"take the model in fp16, bf16, fp32 or fp8 ({' or '.join(FP8)})"
        )
    if end - begin != size_of(dtype, shape):
        raise ValueError(f"size of {name!r}")
    return Stored(file, dtype, tuple(shape), start + begin, end - begin)


# --- reading --------------------------------------------------------------------------------


def pieces(tensor: Stored | View, dtype: str | None = None) -> Iterator[bytearray | memoryview]:
    """A tensor's bytes, row-major and little-endian, in pieces of a few MiB.

    `dtype`: safetensors' name of the float type to convert to; None leaves it as it is. Raises
    `UserError` if a finite value is too large for it or the tensor is not of floats.
    """
    view = tensor if isinstance(tensor, View) else View((tensor,))
    dtype = dtype or view.dtype
    for part in (_transposed(view),) if view.transposed else map(_plain, view.parts):
        for stored, piece in part:
            yield piece if stored.dtype == dtype else _converted(piece, stored, dtype)


def _plain(stored: Stored) -> Iterator[tuple[Stored, bytearray]]:
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset)
        for begin in range(0, stored.size, _PIECE):
            piece = bytearray(min(_PIECE, stored.size - begin))
            if stream.readinto(piece) != len(piece):
                raise UserError(f"{stored.file} shrank while it was read; run again")
            yield stored, piece


def _transposed(view: View) -> Iterator[tuple[Stored, bytearray]]:
    """A transposed tensor in groups of rows, which are columns of the stored tensor."""
    import numpy as np

    (stored,) = view.parts
    height, width = stored.shape
    element = f"V{DTYPE_BYTES[stored.dtype]}"
    if not stored.size:
        return
    matrix = np.memmap(stored.file, element, "r", stored.offset, stored.shape)
    step = max(1, _PIECE // (height * DTYPE_BYTES[stored.dtype]))
    for column in range(0, width, step):
        yield stored, bytearray(matrix[:, column : column + step].T.tobytes())


def _converted(piece: bytearray, stored: Stored, dtype: str) -> memoryview:
    if stored.dtype not in (*FLOATS, *FP8) or dtype not in FLOATS:
        raise UserError(f"{stored.file}: cannot convert {stored.dtype} weights to {dtype}")
    import torch

    source = torch.frombuffer(piece, dtype=torch_dtype(stored.dtype))
    if stored.dtype in FP8:
        source = source.float() * stored.scale
    tensor = source.to(torch_dtype(dtype))
    all_finite = tensor.abs().max().isfinite()  # ten times faster than testing every element
    if not all_finite and not torch.equal(tensor.isfinite(), source.isfinite()):
        raise UserError(f"{stored.file} holds values too large for {dtype}; use fp32 or bf16")
    return tensor.view(torch.uint8).numpy().data


def torch_dtype(dtype: str) -> torch.dtype:
    """torch's of safetensors' name."""
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    }  # fmt: skip
    return getattr(torch, names[dtype])


def read(tensor: Stored | View, dtype: str | None = None) -> bytes:
    """A tensor's bytes; `dtype` and errors as in `pieces`."""
    return b"".join(pieces(tensor, dtype))


def load_tensor(tensor: Stored | View, dtype: str | None = None) -> torch.Tensor:
    """A tensor on the CPU, in its own memory; `dtype` and errors as in `pieces`."""
    import torch

    view = tensor if isinstance(tensor, View) else View((tensor,))
    kind = torch_dtype(dtype or view.dtype)
    content = bytearray(read(view, dtype))
    flat = torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind)
    return flat.reshape(tensor.shape)


def all_finite(piece: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Whether values of a float dtype, little-endian, hold neither NaN nor infinity.

    Whole numbers always do. By the bits alone, without torch.
    """
    import numpy as np

    if dtype not in _EXPONENT or not len(piece):
        return True
    mask = _EXPONENT[dtype]
    bits = np.frombuffer(piece, f"<u{DTYPE_BYTES[dtype]}")
    return int((bits & mask).max()) != mask


def not_finite(source: Source, name: str) -> UserError:
    """The error for a tensor with values that no network can compute with."""
    if isinstance(source, bytes):
        return UserError(f"{name} is NaN or infinite after merging: merge with a smaller scale")
    stored = source.parts[0] if isinstance(source, View) else source
    return UserError(
        f"{stored.file}: {name} holds NaN or infinite values, so every image would be black: the "
        "file is damaged, as merges in fp16 can be; download or make it again"
    )


# --- writing --------------------------------------------------------------------------------


def write(
    file: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    source: Callable[[str], Source],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> int:
    """Writes a safetensors file piece by piece and returns its size in bytes.

    `tensors`: name -> (safetensors dtype, shape). `source(name)`: the tensor to copy, converted to
    that dtype, or its bytes. `metadata`: text by name. `advance(n)`: called for every n bytes
    written. Format: eight bytes with the header's length, the header as JSON, then the bytes of
    all tensors without gaps. Raises `UserError` if the file cannot be written, a value is NaN or
    infinite or does not fit its dtype, or a source is damaged; `Failure` if the disk is full.
    `file` is then unchanged.
    """
    # Wide elements first, so that every tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + size_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(file) as part, part.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            dtype, shape = tensors[name]
            given, written = source(name), 0
            for piece in [given] if isinstance(given, bytes) else pieces(given, dtype):
                if not all_finite(piece, dtype):
                    raise not_finite(given, name)
                stream.write(piece)
                written += len(piece)
                advance(len(piece))
            assert written == size_of(dtype, shape), name
    return 8 + len(text) + end
