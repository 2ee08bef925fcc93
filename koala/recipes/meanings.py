"""What each setting of a recipe means: the comment beside its field, which is written once."""

from __future__ import annotations

import inspect
import io
import tokenize
from dataclasses import fields, is_dataclass
from typing import Any


def explained(recipe: Any) -> str:
    """Every setting of the recipe as a line: name, its value there, what it means."""
    rows = settings_of(recipe)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{name.ljust(widths[0])}  {value.ljust(widths[1])}  {meaning}"
        for name, value, meaning in rows
    )


def as_json(recipe: Any) -> dict[str, dict[str, str]]:
    """The same for programs."""
    return {name: {"value": v, "meaning": meaning} for name, v, meaning in settings_of(recipe)}


def settings_of(node: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """(name, value, meaning) of every setting of a recipe."""
    rows = []
    for field in fields(node):
        value, name = getattr(node, field.name), prefix + field.name
        if is_dataclass(value):
            rows += settings_of(value, f"{name}.")
        else:
            rows.append((name, _shown(value), meanings(type(node)).get(field.name, "")))
    return rows


def _shown(value: Any) -> str:
    """As `--set` takes it, cut short."""
    text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    if isinstance(value, tuple):
        text = ",".join(map(str, value))
    return text if len(text) <= 24 else f"{text[:21]}..."


def meanings(settings: type) -> dict[str, str]:
    """Field -> the comment at the end of its line, and on lines of comments that follow it."""
    found: dict[str, str] = {}
    name, line = "", 0
    names = {field.name for field in fields(settings)}
    source = inspect.cleandoc(inspect.getsource(settings))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in names and token.start[1] == 4:
            name, line = token.string, token.start[0]
        elif token.type == tokenize.COMMENT and name and token.start[0] <= line + 1:
            line = token.start[0]
            found[name] = f"{found.get(name, '')} {token.string.lstrip('# ')}".strip()
    return found
