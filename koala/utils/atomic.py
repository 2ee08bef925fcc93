"""Atomic output: results appear under their final name complete or not at all.

Output goes to a hidden temporary sibling, which is renamed once it is complete and on the disk,
and removed on failure. So an interrupted run or a full disk leaves no partial result behind. What
a killed run left is removed by the next one that writes the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from koala.errors import Failure, UserError

_DAY = 24 * 3600.0  # seconds; what another machine left alone for so long is left over
_RECIPE = "recipe."  # where a run's claim has its recipe, whose names are those of --set
_SHOWN = 5  # settings that a refusal names
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `out` that is renamed to it on success, removed on failure.

    replace: replaces an existing folder; otherwise `UserError` if `out` is not empty. Raises
    `UserError` if `out` is a file or cannot be created, `Failure` if the disk is full.
    """
    _clear_leftovers(out)
    if not (replace and out.is_dir()):
        check_new(out)
    part = _part(out)
    old = part.with_suffix(".old")
    with _explained(out):
        try:
            part.mkdir(parents=True)
            yield part
            for folder, _, names in os.walk(part):
                for name in (*names, ""):
                    to_disk(Path(folder, name))
            if out.is_dir():
                os.replace(out, old)
            os.replace(part, out)
            to_disk(part.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """The same for a file, replacing an existing one (see `check_new`)."""
    part = _part(out)
    with _explained(out):
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            if part.parent not in _left_over:
                _left_over[part.parent] = [*_parts(part.parent)]
            for left in _left_over[part.parent]:
                if left.is_file() and _is_leftover(left, out.name):
                    left.unlink(missing_ok=True)
            yield part
            to_disk(part)
            os.replace(part, out)
            to_disk(part.parent)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Keeps other processes out of a run's folder, which is made if it is missing.

    name: of the file in it that stands for the lock, which ends with the process. A folder that was
    made and holds nothing in the end is removed. Raises `UserError` if another process is there.
    """
    from filelock import FileLock, Timeout

    with _explained(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is in use by another process: wait until it has ended, or name another "
                "folder"
            ) from None
    try:
        yield
    finally:
        (folder / name).unlink(missing_ok=True)
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def write_text(out: Path, text: str) -> None:
    """Writes a UTF-8 text file through `new_file`."""
    with new_file(out) as part:
        part.write_text(text, encoding="utf-8")


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk.

    Not on Windows, which cannot do it with a read-only handle.
    """
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def claim(
    file: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Records in the JSON `file` the settings its folder is made with; `UserError` if they differ.

    defaults: of settings that a file written by an older version may lack.
    """
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        write_text(file, json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(file.read_text("utf-8"))
    check_claim(file, {**dict.fromkeys([*(defaults or {}), *found]), **wanted}, defaults)


def check_claim(
    file: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """`UserError` if the JSON `file` is there and differs in one of these settings; see `claim`."""
    if not file.exists():
        return
    wanted = json.loads(json.dumps(settings))
    found = json.loads(json.dumps(defaults or {})) | json.loads(file.read_text("utf-8"))
    known = {name: found.get(name) for name in wanted}
    changes = [(path.removeprefix(_RECIPE), *pair) for path, *pair in _changes(known, wanted)]
    named = {path.rpartition(".")[2] for path, _, _ in changes if "." in path}  # in the recipe too
    changes = [change for change in changes if change[0] not in named]
    if changes:
        said = [f"{path}={old!r}, now it is {new!r}" for path, old, new in changes]
        more = f"; {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
        raise UserError(
            f"{file.parent} was made with {'; '.join(said[:_SHOWN])}{more}; take another --out, or "
            "remove this folder"
        )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(path, old value, new value) of every setting that differs, by name; in dicts a.b."""
    for name in sorted({*old, *new}):
        mine, theirs = old.get(name), new.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            for path, *pair in _changes(mine, theirs):
                yield f"{name}.{path}", *pair
        elif mine != theirs:
            yield name, mine, theirs


def check_new(out: Path) -> None:
    """Raises `UserError` if `out` is a file or a folder that is not empty."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; name a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new one")


def _clear_leftovers(out: Path) -> None:
    """Removes what killed runs left of this folder; one that was being replaced comes back."""
    parent, name = out.absolute().parent, out.absolute().name
    for left in [*_parts(parent)]:
        if not _is_leftover(left, name):
            continue
        if left.suffix == ".old" and not out.exists():
            os.replace(left, out)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


_PART = re.compile(r"\.(.+)\.(?:([0-9a-f]{8})-)?(\d+)(?:-[0-9a-f]{8})?\.(part|old)", re.ASCII)
_left_over: dict[Path, list[Path]] = {}  # the parts in a folder when this process first wrote there
_ours: set[str] = set()  # the names of the parts that this process made


def _parts(folder: Path) -> Iterator[Path]:
    """The temporary files and folders in a folder, in the order of their names."""
    with contextlib.suppress(OSError):  # one that may be written to, but not listed
        yield from (folder / name for name in sorted(os.listdir(folder)) if _PART.fullmatch(name))


def _is_leftover(path: Path, name: str) -> bool:
    """Whether a part is one of `name`, and whoever wrote it has ended."""
    match = _PART.fullmatch(path.name)
    if match is None or match[1] != name or path.name in _ours:
        return False
    if match[2] in (None, _machine()):
        return not _runs(int(match[3]))
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > _DAY
    return False


def _machine() -> str:
    """8 hexadecimal digits of this machine's name: several may share a folder."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _runs(process: int) -> bool:
    """Whether another process of that number runs. In a container a new one often has the same."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _part(out: Path) -> Path:
    unique = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    part = out.absolute().with_name(f".{out.absolute().name}.{unique}.part")
    _ours.add(part.name)
    return part


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns an `OSError` into one line that names the output."""
    try:
        yield
    except OSError as error:
        if any(parent.name.endswith(".part") for parent in out.parents):
            raise  # reported by the enclosing new_folder
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise Failure(
                f"cannot write {out}: {reason}; free space or name another disk"
            ) from None
        raise UserError(f"cannot write {out}: {reason}") from None
