"""KOALA: Stable-Diffusion-XL-class text-to-image models, made small and fast.

    import koala
    koala.load("koala-mini")("a red fox, flat twemoji style", seed=7).images[0].save("fox.png")

The functions mirror the commands of `koala --help`; each is imported when it is first used, so
that importing this package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # function -> where it lives
    "load": "koala.generation.loader",
    "inspect": "koala.checkpoints.inspect",
    "compress": "koala.checkpoints.compress",
    "convert": "koala.checkpoints.convert",
    "prepare": "koala.data.prepare",
    "distill": "koala.recipes.train",
    "evaluate": "koala.evaluation.report",
}
__all__ = [
    "__version__",
    "compress",
    "convert",
    "distill",
    "evaluate",
    "inspect",
    "load",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'koala' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
