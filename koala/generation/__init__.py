"""Prompts to pictures: encode, denoise and decode as plain functions, and a pipeline of them."""

from koala.generation.pictures import check_writable, read_settings, save
from koala.generation.pipeline import Pipeline, Result, Settings, load

__all__ = [
    "Pipeline",
    "Result",
    "Settings",
    "check_writable",
    "load",
    "read_settings",
    "save",
]
