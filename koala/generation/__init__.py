"""Prompts to images: encode, denoise and decode as plain functions, and a pipeline of them.

Names are imported when first used, so that checking a request loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koala.generation.drawing import Result
    from koala.generation.engine import Engine, Late, Pass, Progress, Ticket
    from koala.generation.loader import load
    from koala.generation.pipeline import Pipeline
    from koala.generation.png import check_writable, read_settings, save
    from koala.generation.requests import Request, Settings

_HOME = {
    "engine": ("Engine", "Late", "Pass", "Progress", "Ticket"),
    "png": ("check_writable", "read_settings", "save"),
    "opening": ("load",),
    "drawing": ("Result",),
    "pipeline": ("Pipeline",),
    "requests": ("Request", "Settings"),
}
__all__ = [
    "Engine",
    "Late",
    "Pass",
    "Pipeline",
    "Progress",
    "Request",
    "Result",
    "Settings",
    "Ticket",
    "check_writable",
    "load",
    "read_settings",
    "save",
]

if not TYPE_CHECKING:  # as in koala/__init__.py

    def __getattr__(name: str) -> Any:
        for module, names in _HOME.items():
            if name in names:
                return getattr(import_module(f"koala.generation.{module}"), name)
        raise AttributeError(f"module 'koala.generation' has no attribute {name!r}")
