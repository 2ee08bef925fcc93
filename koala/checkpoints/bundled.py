"""The models that ship with the package.

The family shares VAE, text encoders and tokenizers. They lie in the folder of one member; the
others hold what is their own, and are completed by links in the cache when they are first used.
"""

import hashlib
import os
import shutil
from pathlib import Path

from koala.errors import UserError
from koala.utils.asset_packages import cache_folder
from koala.utils.atomic import new_folder

BUNDLED = Path(__file__).parents[1] / "bundled"
WHOLE = "koala-mini"  # the member with all parts
DEFAULT = "koala-mini-guided"  # what draws where no model is named: four passes, not twenty
# What `koala serve` takes: clients send a guidance scale and a negative prompt with every request,
# and a model without guidance looks burnt with them.
SERVED = "koala-mini"


def bundled_names() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def bundled_folder(name: str) -> Path:
    """The complete pipeline folder of a model that ships with the package."""
    own, whole = BUNDLED / name, BUNDLED / WHOLE
    shared = [part for part in sorted(whole.iterdir()) if part.is_dir()]
    if all((own / part.name).exists() for part in shared):
        return own
    parts = [*sorted(own.iterdir()), *(p for p in shared if not (own / p.name).exists())]
    key = " ".join(f"{part} {part.stat().st_mtime_ns}" for part in parts)
    made = cache_folder() / "bundled" / hashlib.sha256(key.encode()).hexdigest()[:12] / name
    try:
        if not made.is_dir():
            with new_folder(made) as folder:
                for part in parts:
                    _link(part, folder / part.name)
    except UserError:  # unless another process was first
        if not made.is_dir():
            raise
    return made


def _link(part: Path, to: Path) -> None:
    """A symbolic link, or a copy where there are none (Windows without developer mode)."""
    try:
        os.symlink(part, to)
    except OSError:
        (shutil.copytree if part.is_dir() else shutil.copy)(part, to)
