"""Values as programs write them: numbers as texts or floats, fields that are null or empty.

A template of a workflow makes every value a text; other languages have one kind of number.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from koala.serving.sampler_names import own_name

LONGEST_SHOWN = 60  # characters of a value in an error


def whole(value: object) -> object:
    """1 for 1.0 and "1.0"; else the value. ValueError for true and false."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,40}(\.0*)?\s*", value, re.ASCII):
        return int(value.partition(".")[0])
    number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: object) -> object:
    """The value. ValueError for true and false, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


def spelled_size(size: object) -> object:
    """ "64x32" for what other programs write so: 64*32, 64 x 32, with a sign of multiplication."""
    if not isinstance(size, str):
        return size
    return re.sub(r"(?<=[0-9])\s*[xX*\u00d7]\s*(?=[0-9])", "x", size)


def sampler_name(name: object) -> object:
    """Our name of a sampler; None for the model's own."""
    return own_name(name) if isinstance(name, str) else name


Whole = Annotated[int, BeforeValidator(whole)]
Number = Annotated[float, BeforeValidator(number)]
Size = Annotated[str | None, BeforeValidator(spelled_size)]
SamplerName = Annotated[str | None, BeforeValidator(sampler_name)]


def told(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: those that are null or "" are as good as left out.

    A prompt is not: nothing would be drawn without it.
    """
    return {
        name: value for name, value in values.items()
        if name == "prompt" or value not in (None, "")
    }  # fmt: skip


def plain(value: Any) -> Any:
    """False for "false", 1.0 for "1.0"; else the value."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    return float(text) if re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?", text, re.ASCII) else value


def shown(value: object) -> str:
    """The value in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
