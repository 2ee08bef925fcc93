"""The syntax of prompts, that of AUTOMATIC1111's web UI:

    (word)       1.1 times the weight       (word:1.3)   1.3 times the weight
    [word]       1 / 1.1 times              \\( \\: \\{ \\\\       any sign itself
    a BREAK b    b begins a new chunk       nested brackets multiply

`koala.generation.prompts` says what a weight does. Importing this loads no torch.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from koala.errors import UserError

ROUND, SQUARE = 1.1, 1 / 1.1
MOST_WEIGHT = 10.0

_MARKS = re.compile(
    r"\\(?:[^\w\s]|_)"  # an escaped sign
    r"|[(\[\])]"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|\s*\bBREAK\b\s*"
    r"|[^\\()\[\]:B\s]+|\s+|."  # text: a run of plain characters or of spaces, any other one
    , re.DOTALL,
)  # fmt: skip


_WORDS = re.compile(r"\b(AND(_\w+)?|BREAK|ADD(COL|ROW|COMM|BASE))\b")  # this syntax, and others'
_SIGNS = re.compile(r"[()\[\]\\{}|:\uff1a]|(?<!\S)[-/\u2013\u2014](?=\S)|(?<=_)_")


def escaped(text: str) -> str:
    """A prompt that is drawn as this text word for word, whatever any program would read in it.

    Words such as AND and BREAK become small letters, as the text encoders read all words.
    """
    plain = _WORDS.sub(lambda word: word[0].lower(), text)
    return _SIGNS.sub(lambda sign: f"\\{sign[0]}", plain)


@dataclass(frozen=True)
class Fragment:
    """Text of one weight."""

    text: str
    weight: float


def parse(prompt: str) -> list[list[Fragment]]:
    """The parts of a prompt between its BREAKs, each as fragments of one weight.

    Brackets need not match: one that is not closed extends to the end, one that was not opened is
    text. UserError for a weight outside 0..10.
    """
    found: list[str | None] = []  # texts; None is a BREAK
    brackets: list[_Bracket] = []
    opened: list[_Bracket] = []
    for mark in _MARKS.finditer(prompt):
        token = mark[0]
        last = opened[-1].kind if opened else ""
        if token.strip() == "BREAK":
            found.append(None)
        elif token in ("(", "["):
            opened.append(_Bracket(token, len(found), ROUND if token == "(" else SQUARE))
            brackets.append(opened[-1])
        elif token == "]" and last == "[":
            opened.pop().end = len(found)
        elif (token == ")" or mark["weight"]) and last == "(":
            opened[-1].weight = float(mark["weight"] or ROUND)
            opened.pop().end = len(found)
        else:
            escaped = len(token) == 2 and token[0] == "\\"
            found.append(token[1:] if escaped else token)
    for bracket in opened:
        bracket.end = len(found)
    return _parts(zip(found, _weights(brackets, len(found)), strict=True))


@dataclass
class _Bracket:
    kind: str
    start: int  # index of the first text inside
    weight: float
    end: int = -1  # while it is open


def _weights(brackets: Sequence[_Bracket], count: int) -> Iterator[float]:
    """The weight of each of `count` texts: the product of all brackets around it, in one pass.

    The brackets nest, and are sorted by their start.
    """
    coming = iter(brackets)
    next_one = next(coming, None)
    inside: list[tuple[int, float]] = [(count + 1, 1.0)]  # ends and weights, the outermost first
    for i in range(count):
        while inside[-1][0] <= i:
            inside.pop()
        while next_one is not None and next_one.start == i:
            if next_one.end > i:
                inside.append((next_one.end, inside[-1][1] * next_one.weight))
            next_one = next(coming, None)
        yield inside[-1][1]


def _parts(found: Iterable[tuple[str | None, float]]) -> list[list[Fragment]]:
    """Texts split at the BREAKs, neighbours of one weight joined, without empty parts but one."""
    parts: list[list[tuple[float, list[str]]]] = [[]]
    for text, weight in found:
        if not 0 <= weight <= MOST_WEIGHT:
            raise UserError(
                f"the prompt gives {text!r} the weight {weight:g}: allowed are weights from 0 to "
                f"{MOST_WEIGHT:g}, 1.3 is a strong one"
            )
        if text is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1][0] == weight:
            parts[-1][-1][1].append(text)
        else:
            parts[-1].append((weight, [text]))
    joined = [[Fragment("".join(texts), weight) for weight, texts in part] for part in parts]
    return [part for part in joined if part] or [[]]
