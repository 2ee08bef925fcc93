"""Prompts to pictures: encode, denoise and decode as plain functions, and a pipeline of them."""

from koala.generation.engine import Engine, Late, Pass, Progress, Ticket
from koala.generation.pipeline import Pipeline, Result, load
from koala.generation.png import check_writable, read_settings, save
from koala.generation.requests import Request, Settings

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
