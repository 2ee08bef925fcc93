"""Resolves a model's name: bundled, a folder, a single file, or on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from koala.checkpoints import single_file
from koala.checkpoints.bundled import bundled_folder, bundled_names
from koala.checkpoints.pipeline_files import SCHEDULER, Contents, from_folder, write_pipeline
from koala.checkpoints.prediction import Prediction, of_config
from koala.checkpoints.run_folder import describe, is_run, read_checkpoint, result_of
from koala.checkpoints.validate import (
    CONFIGS,
    WEIGHTS,
    architecture_of,
    check_folder,
    check_kind,
    is_unet,
    read_json,
    some,
)
from koala.errors import UserError, unknown
from koala.utils.asset_packages import cache_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(rf"({HUB_ID.pattern})/([\w.-][\w./-]*\.safetensors)")  # org/name/FILE
_HUB_SMALL = (
    "model_index.json",
    "config.json",  # of a network alone
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "words.json",
    *(f"{component}/*.{ending}" for component in CONFIGS for ending in ("json", "txt")),
)
_HUB_ALL = (*_HUB_SMALL, *(f"{component}/*.safetensors" for component in WEIGHTS))
_FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")
_PUBLISHED = {  # name -> KOALA's models on the Hub
    name: f"etri-vilab/{name}"
    for name in ("koala-700m", "koala-1b", "koala-lightning-700m", "koala-lightning-1b")
}


def resolve_model(name_or_path: str | Path) -> Path:
    """The checked folder of a model.

    `name_or_path`: a bundled name ("koala-mini"), the path of a folder, a Hub id ("org/name"),
    downloaded unless the local Hugging Face cache has it, or a single file in SDXL's original
    layout, local or on the Hub ("org/name/FILE.safetensors"), unpacked once into koala's cache. A
    folder of a training is its model, or where that is not finished the average in its newest
    checkpoint, unpacked alike. A bundled name wins over a folder of that name in the working
    directory (write ./koala-mini).
    Raises `UserError` if it is none of these or the model is not a complete SDXL pipeline.
    """
    name = str(name_or_path)
    if file := single_file_path(name_or_path):
        folder = unpacked(file)
    elif name in bundled_names():
        folder = bundled_folder(name)
    elif name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        if is_run(folder):
            result = result_of(folder)
            folder = result if result.is_dir() else _of_checkpoint(result)
    elif isinstance(name_or_path, str) and _of_hub(name):
        folder = _hub_model(name)
    elif name.lower().endswith(_FILE_ENDINGS):
        raise UserError(f"model {name} does not exist: give an existing file, a folder or a Hub id")
    elif name.lower() in _PUBLISHED:
        raise UserError(
            f"no model called {name} is bundled; on the Hub it is {_PUBLISHED[name.lower()]}: give "
            "that"
        )
    else:
        raise unknown(
            "model", name, bundled_names(), ", a folder in diffusers' SDXL layout, a single "
            ".safetensors file, or a Hub id like org/name",
        )  # fmt: skip
    check_folder(folder)
    return folder


def _of_hub(name: str) -> bool:
    """Whether a name that is no path here is a Hub id, and not that of a file, as models/x.ckpt."""
    return bool(HUB_ID.fullmatch(name)) and not name.lower().endswith(_FILE_ENDINGS)


def name_of(model: str | Path) -> str:
    """What a model is called: as its file or folder is, else as it was asked for."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def check_name(model: str) -> None:
    """UserError as in `resolve_model`, but without downloading or unpacking.

    A single file, or a folder with a U-Net alone, need not be complete: parts of others may be
    meant for it.
    """
    path = Path(model).expanduser()
    of_hub = not path.exists() and (_of_hub(model) or _HUB_FILE.fullmatch(model))
    if path.is_file():
        single_file.open_file(path)
    elif model not in bundled_names() and is_unet(path):
        architecture_of(path / "config.json", model)
    elif not of_hub:
        resolve_model(model)


def local_prediction(model: str) -> Prediction | None:
    """What a model predicts; None for one on the Hub, which is not downloaded.

    Reads headers and small files alone. Raises `UserError` as `check_name` does.
    """
    check_name(model)
    path = Path(model).expanduser()
    if model in bundled_names() or (path.is_dir() and not is_unet(path)):
        folder = resolve_model(model)
        return of_config(read_json(folder / SCHEDULER))
    return single_file.open_file(path).prediction or Prediction() if path.is_file() else None


def single_file_path(model: str | Path) -> Path | None:
    """The path of the single file that a model's name refers to; None if it is no single file.

    A file on the Hub is downloaded unless the local cache has it; UserError if that fails.
    """
    path = Path(model).expanduser()
    if str(model) in bundled_names() or path.is_dir():
        return None
    if not path.exists() and isinstance(model, str) and (found := _HUB_FILE.fullmatch(model)):
        return _hub_file(*found.groups())
    return path if path.is_file() else None


def _hub_model(hub_id: str) -> Path:
    """A Hub model's folder in the local cache, downloaded only if it is not complete there.

    Its small files come first, so that a model of another kind is refused before its weights are
    fetched. Weights of the fp16 variant are fetched where there are no others.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(HfHubHTTPError, OSError, ValueError):  # not there, or incomplete
        folder = Path(snapshot_download(hub_id, allow_patterns=[*_HUB_ALL], local_files_only=True))
        check_folder(folder)
        return folder
    small = hub_folder(hub_id, _HUB_SMALL)
    if not any((small / name).is_file() for name in ("model_index.json", "config.json")):
        raise UserError(
            f"{hub_id} on the Hub is no model in folders (it has no model_index.json): name one of "
            f"its files, as {hub_id}/FILE.safetensors"
        )
    check_kind(small)
    folder = hub_folder(hub_id, _HUB_ALL, ("*.fp16*",))
    for component in WEIGHTS:
        if not any((folder / component).glob(f"{WEIGHTS[component]}*.safetensors")):
            hub_folder(hub_id, (f"{component}/{WEIGHTS[component]}*.fp16*",))
    return folder


def hub_folder(hub_id: str, files: Sequence[str], but: Sequence[str] = ()) -> Path:
    """The local copy of a Hub repository with the files of these patterns, downloaded if need be.

    but: patterns of files that are not wanted. Raises `UserError` if it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns: dict[str, Any] = {"allow_patterns": [*files], "ignore_patterns": [*but]}
    try:
        return Path(snapshot_download(hub_id, **patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model {hub_id!r} is not a local folder and cannot be downloaded from the Hub "
            f"({_first_line(error)}); without a network, run `hf download {hub_id} --local-dir "
            "DIR` where there is one, copy DIR here and give its path; bundled: "
            f"{some(bundled_names())}"
        ) from None


def _hub_file(hub_id: str, file: str) -> Path:
    """A Hub file's path in the local cache, downloaded only if it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(HfHubHTTPError, OSError, ValueError):  # not in the cache
        return Path(hf_hub_download(hub_id, file, local_files_only=True))
    try:
        return Path(hf_hub_download(hub_id, file))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model {f'{hub_id}/{file}'!r} is not a local file and cannot be downloaded from the "
            f"Hub ({_first_line(error)}); without a network, run `hf download {hub_id} {file} "
            "--local-dir DIR` where there is one, copy the file here and give its path"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_model(model: str | Path) -> Contents:
    """The contents of a model: a bundled name, a folder, a Hub id or a single file.

    Reads no weights. Raises `UserError` as `resolve_model` and `single_file.read` do.
    """
    if file := single_file_path(model):
        return single_file.read(file)
    return from_folder(resolve_model(model))


def models_cache() -> Path:
    """Where models that koala made from others' files lie."""
    return cache_folder() / "models"


def unpacked(file: Path) -> Path:
    """The model folder of a single file, unpacked into the cache if it is not there yet."""
    return _unpacked(file, file.stem, single_file.read, f"unpacking {file}")


def _of_checkpoint(state: Path) -> Path:
    """The model folder of a training's checkpoint, in the cache as that of a single file."""
    telling = f"taking the average of a training that has not finished, {describe(state)},"
    return _unpacked(state, state.parents[2].name, read_checkpoint, telling)


def _unpacked(file: Path, stem: str, read: Callable[[Path], Contents], telling: str) -> Path:
    """The model folder in the cache of what `read` finds in a file, made if it is not there yet.

    Of several processes that need it, one unpacks and the others wait. The lock is the operating
    system's, so it ends with its process, however that ends. Raises as `single_file.read` and
    `write_pipeline` do.
    """
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    name = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = models_cache() / name
    if folder.is_dir():
        return folder
    contents = read(file)  # first, so that an invalid file prints only its error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        from filelock import FileLock

        lock = FileLock(folder.with_name(f".{name}.lock"))
        with lock:
            if not folder.is_dir():
                for leftover in folder.parent.glob(f".{glob.escape(name)}.*.part"):
                    shutil.rmtree(leftover)  # of a process that was killed
                print(f"koala: {telling} into {folder}, once", file=sys.stderr)
                write_pipeline(contents, folder)
    except OSError as error:
        raise UserError(
            f"cannot unpack {file} into {folder} ({error}); set KOALA_CACHE to a folder that can "
            "be written"
        ) from None
    return folder
