"""Prompts that change while an image is drawn, as in AUTOMATIC1111's web UI:

    [cat:dog:0.5]   cat in the first half of the steps, dog in the second
    [cat:dog:4]     cat in the first four steps
    [dog:0.5]       dog in the second half        [cat::0.5]   cat in the first half
    [cat|dog]       they take turns, step by step

These may be nested. Importing this loads no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, Union

from koala.errors import UserError
from koala.generation import prompt_dialects

MOST_VARIANTS = 64  # prompts of one image: each is encoded and kept
DEEPEST = 20  # brackets within brackets

_TOKENS = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_NUMBER = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*", re.ASCII)

Items: TypeAlias = list[Union[str, "_Edit"]]


@dataclass(frozen=True)
class _Edit:
    """A bracket whose text depends on the step."""

    options: tuple[Items, ...]
    until: int | None  # the step at which the second option takes over; None: they take turns

    def at(self, step: int) -> Items:
        if self.until is None:
            return self.options[step % len(self.options)]
        return self.options[step >= self.until]


def by_step(prompt: str, steps: int) -> list[str]:
    """The prompt of each of `steps` steps.

    UserError for brackets that are neither a change nor a weight, a change after the last step,
    more than 64 different prompts, and what only other programs read.
    """
    prompt_dialects.refuse(prompt)
    items = _parse(prompt, steps)
    if all(isinstance(item, str) for item in items):
        return [prompt] * steps
    found = [_text(items, step) for step in range(steps)]
    if (count := len(set(found))) > MOST_VARIANTS:
        raise UserError(
            f"the prompt changes into {count} different ones over the steps: allowed are "
            f"{MOST_VARIANTS}; let fewer brackets take turns"
        )
    return found


def _text(items: Items, step: int) -> str:
    return "".join(item if isinstance(item, str) else _text(item.at(step), step) for item in items)


class _Frame:
    """A bracket that is being read: its parts between separators."""

    def __init__(self, opening: str) -> None:
        self.opening = opening
        self.parts: list[Items] = [[]]
        self.separators: list[str] = []

    def items(self) -> Items:
        """All that was read, as it stood there."""
        found: Items = [self.opening, *self.parts[0]]
        for separator, part in zip(self.separators, self.parts[1:], strict=True):
            found += [separator, *part]
        return found


def _parse(prompt: str, steps: int) -> Items:
    """The prompt's text and changes. Brackets that do not match are text."""
    frames = [_Frame("")]
    for token in _TOKENS.findall(prompt):
        top = frames[-1]
        if token in ("(", "["):
            frames.append(_Frame(token))
        elif token in (")", "]") and top.opening == {")": "(", "]": "["}[token]:
            frames.pop()
            closed = _edit(top, steps) if token == "]" else None
            frames[-1].parts[-1] += [closed] if closed else [*top.items(), token]
        elif token in (":", "|") and top.opening == "[":
            top.separators.append(token)
            top.parts.append([])
        else:
            top.parts[-1].append(token)
    while len(frames) > 1:
        unclosed = frames.pop()
        frames[-1].parts[-1] += unclosed.items()
    if _depth(frames[0].items()) > DEEPEST:
        raise UserError(f"the prompt's changes are nested deeper than {DEEPEST}: nest fewer")
    return frames[0].items()


def _edit(frame: _Frame, steps: int) -> _Edit | None:
    """What a closed [...] stands for; None for a weight."""
    kinds, parts = set(frame.separators), frame.parts
    if not kinds:
        return None
    if kinds == {"|"}:
        return _Edit(tuple(parts), None)
    shown = "".join(item if isinstance(item, str) else "[...]" for item in frame.items()) + "]"
    last = parts[-1][0] if len(parts[-1]) == 1 else ""
    number = _NUMBER.fullmatch(last) if isinstance(last, str) else None
    if kinds == {":"} and len(parts) == 2 and number is None:
        return None  # [note: text]
    if kinds != {":"} or len(parts) > 3 or number is None:
        raise UserError(
            f"{shown} in the prompt is no change that is known: allowed are [cat:dog:0.5], "
            "[dog:0.5], [cat::0.5] and [cat|dog]; write \\[ for a bracket itself"
        )
    before, after = parts[0] if len(parts) == 3 else [], parts[-2]
    return _Edit((before, after), _step(number[1], steps, shown))


def _step(number: str, steps: int, shown: str) -> int:
    """How many steps come before a change: a share of them with a point, else their number."""
    share = float(number) if "." in number else None
    if share is not None and share > 1:
        raise UserError(
            f"{shown} in the prompt changes after {number} of the steps: allowed are shares up to "
            "1.0 and whole numbers of steps; a weight is written (word:1.3)"
        )
    at = int(number) if share is None else int(share * steps)
    if at > steps:
        raise UserError(
            f"{shown} in the prompt changes at step {at}, but {steps} are done: change earlier, "
            "or take more steps"
        )
    return at


def _depth(items: Sequence[str | _Edit]) -> int:
    """How deep changes are nested; stops counting soon after what is allowed."""
    depth, level = 0, [item for item in items if isinstance(item, _Edit)]
    while level and depth <= DEEPEST:
        depth += 1
        level = [
            item
            for edit in level
            for option in edit.options
            for item in option
            if isinstance(item, _Edit)
        ]
    return depth
