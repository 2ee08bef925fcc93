"""Overrides a recipe's settings from the command line, as in `--set training.batch=64`.

A name is the path to a field of the recipe's dataclasses; a value is parsed by the field's type.
Lists are separated by commas. Taps are written as in `koala.recipes.paper`: "sa+lf@DW-1,UP-3" is
self-attention everywhere and the last feature of two stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from koala.distillation.settings import Tap
from koala.errors import UserError, unknown

T = TypeVar("T")


def overridden(recipe: T, given: Sequence[str]) -> T:
    """The recipe with "name=value" settings replaced.

    UserError for an unknown name (the message lists all names), a repeated one, a value of
    another type, and values that the settings reject.
    """
    kinds = dict(_settings(recipe))
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"--set {text}: the form is NAME=VALUE, as in training.batch=64")
        if name not in kinds:
            short = [known for known in kinds if known.rpartition(".")[2] == name]
            if short:
                raise UserError(f"--set {text}: write {' or '.join(short)}={value}")
            raise unknown("--set name", name, kinds)
        if name in values:
            raise UserError(f"--set {name} is given twice")
        values[name] = _read(name, value, kinds[name])
    return _replaced(recipe, values)


def taps_of(text: str) -> tuple[Tap, ...]:
    """Parses taps: "" is none, "sa+lf@DW-1,UP-3" two kinds. UserError if invalid."""
    taps = []
    for part in text.split("+") if text else ():
        location, at, stages = part.partition("@")
        taps.append(Tap(location, tuple(stages.split(",")) if at else None))
    return tuple(taps)


def _settings(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Path and type of every field that is not a dataclass itself."""
    hints = get_type_hints(type(node))
    found = []
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            found += _settings(value, f"{prefix}{field.name}.")
        elif not _of_settings(hints[field.name]):
            found.append((prefix + field.name, hints[field.name]))
    return found


def _of_settings(kind: Any) -> bool:
    """Whether it is settings or None: what a recipe without them leaves out has no names."""
    return get_origin(kind) is UnionType and any(is_dataclass(one) for one in get_args(kind))


def _replaced(node: T, values: dict[str, Any]) -> T:
    """The dataclass with the values, by path; each dataclass is replaced, and checked, once."""
    inner: dict[str, dict[str, Any]] = {}
    changes: dict[str, Any] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            changes[name] = value
    changes |= {name: _replaced(getattr(node, name), below) for name, below in inner.items()}
    return replace(node, **changes)  # type: ignore[type-var]  # T: of any dataclass


# --- values ---------------------------------------------------------------------------------


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text]


_PLAIN: dict[type, tuple[Callable[[str], Any], str]] = {  # parser and description of a type
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (_truth, "true or false"),
    str: (str, "text"),
}


def _read(name: str, text: str, kind: Any) -> Any:
    """Parses `text` as the type `kind`; UserError says what it must be."""
    if kind == tuple[Tap, ...]:
        return taps_of(text)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:  # "X | None"
        (kind,) = (one for one in inner if one is not NoneType)
        return None if text == "none" else _read(name, text, kind)
    if origin is tuple:
        parts = text.split(",") if text else []
        if Ellipsis not in inner and len(parts) != len(inner):
            raise UserError(f"--set {name}={text}: it must be {len(inner)} values, as in 1,2")
        return tuple(_read(name, part, inner[0]) for part in parts)
    if origin is dict:  # "fox:3,owl:1"
        pairs = [part.rpartition(":") for part in text.split(",")]
        return {_read(name, key, inner[0]): _read(name, value, inner[1]) for key, _, value in pairs}
    reader, what = _PLAIN[kind]
    try:
        return reader(text)
    except (KeyError, ValueError):
        raise UserError(f"--set {name}={text}: it must be {what}") from None
