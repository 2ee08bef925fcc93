"""Results appear under their final name whole or not at all.

Work goes to a hidden sibling that takes the name when all is written and is removed when it is
not. So an interrupted run, a full disk or a refused input leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from koala.errors import Failure, UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its name if all goes well, and goes if not.

    Raises `UserError` if `out` is a file, a folder that is not empty, or cannot be made;
    `Failure` if the disk is full.
    """
    check_new(out)
    part = _part(out)
    with _explained(out):
        try:
            part.mkdir(parents=True)
            yield part
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """The same for a file. An existing one is replaced: `check_new` is the caller's to ask."""
    part = _part(out)
    with _explained(out):
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            yield part
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)


def check_new(out: Path) -> None:
    """Raises `UserError` if `out` is a file or a folder that is not empty."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; name a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new one")


def _part(out: Path) -> Path:
    return out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.part")


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Says of an `OSError` which output it kept from being written."""
    try:
        yield
    except OSError as error:
        if any(parent.name.endswith(".part") for parent in out.parents):
            raise  # the folder that it is a part of says so
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise Failure(
                f"cannot write {out}: {reason}; free space or name another disk"
            ) from None
        raise UserError(f"cannot write {out}: {reason}") from None
