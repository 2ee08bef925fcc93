"""Prompts of any length, with weights, to what the U-Net reads.

The text encoders read a fixed number of tokens at a time; longer prompts are read in chunks, whose
embeddings stand one after the other. The syntax is that of AUTOMATIC1111's web UI:

    (word)       1.1 times the weight       (word:1.3)   1.3 times the weight
    [word]       1 / 1.1 times              \\( \\) \\[ \\] \\\\   the character itself
    a BREAK b    b begins a new chunk       nested brackets multiply

A weight w moves a token's embedding away from that of the empty prompt at the same place: e0 +
w (e - e0). So do ComfyUI and, for weights above 1, compel; AUTOMATIC1111 scales e itself and puts
the mean over the prompt back, so that each weighted word changes all the others.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from koala.errors import UserError
from koala.text_conditioning import TextConditioner

ROUND, SQUARE = 1.1, 1 / 1.1
MOST_WEIGHT = 10.0

_MARKS = re.compile(
    r"\\[()\[\]\\]"  # an escaped character
    r"|[(\[\])]"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|\s*\bBREAK\b\s*"
    r"|[^\\()\[\]:B\s]+|\s+|."  # text: a run of plain characters or of spaces, any other one
    , re.DOTALL,
)  # fmt: skip


@dataclass(frozen=True)
class Fragment:
    """Words of one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Encoded:
    """One prompt as the U-Net reads it; t is a multiple of the tokens read at a time."""

    text: Tensor  # [1, t, d]
    pooled: Tensor  # [1, p]


# --- syntax ---------------------------------------------------------------------------------


def parse(prompt: str) -> list[list[Fragment]]:
    """The parts of a prompt between its BREAKs, each in fragments of one weight.

    A bracket without its partner is no mistake: one that is not closed holds to the end, one that
    was not opened is text. UserError for a weight that is not in 0..10.
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
    start: int  # of what it holds, among the texts found
    weight: float
    end: int = -1  # where it has no end yet


def _weights(brackets: Sequence[_Bracket], count: int) -> Iterator[float]:
    """The weight of each of `count` texts: all brackets round it multiplied, in one pass.

    The brackets nest, and are in the order in which they begin.
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
    """Split at the BREAKs; neighbours of one weight joined; empty parts left out, all but one."""
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


# --- embeddings -----------------------------------------------------------------------------


def encode(conditioner: TextConditioner, prompt: str) -> Encoded:
    """The embeddings of a whole prompt; the pooled one is that of its first chunk.

    A chunk ends with a word, unless a single word fills it. A prompt without brackets that fits
    into one chunk has exactly the embedding that training gave it. UserError as from `parse`.
    """
    parts = parse(prompt)
    sides = [_chunks(parts, side, conditioner.tokens - 2) for side in conditioner.tokenizers]
    texts, pooled = [], []
    for pair in zip_longest(*sides, fillvalue=_Chunk((), ())):
        text, of_all = conditioner.encode_ids((pair[0].ids, pair[1].ids))
        texts.append(_weighted(conditioner, text, pair))
        pooled.append(of_all)
    return Encoded(torch.cat(texts)[None], pooled[0][None])


def padded(conditioner: TextConditioner, encoded: Encoded, tokens: int) -> Encoded:
    """The same, `tokens` long, with chunks of the empty prompt at the end."""
    missing = (tokens - encoded.text.shape[1]) // conditioner.tokens
    empty, _ = conditioner.encode_ids(((), ()))
    return Encoded(torch.cat([encoded.text[0], *[empty] * missing])[None], encoded.pooled)


@dataclass(frozen=True)
class _Chunk:
    """As many tokens as an encoder reads at a time, without the marks, each with its weight."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def _chunks(
    parts: list[list[Fragment]], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[_Chunk]:
    chunks = []
    for part in parts:
        ids: list[int] = []
        weights: list[float] = []
        for fragment in part:
            more = tokenizer(fragment.text, add_special_tokens=False, verbose=False).input_ids
            ids += more
            weights += [fragment.weight] * len(more)
        while len(ids) > length:
            end = _word_end(tokenizer.convert_ids_to_tokens(ids[:length])) or length
            chunks.append(_Chunk(tuple(ids[:end]), tuple(weights[:end])))
            del ids[:end], weights[:end]
        chunks.append(_Chunk(tuple(ids), tuple(weights)))
    return chunks


def _word_end(tokens: list[str]) -> int:
    """How many of the tokens are whole words."""
    return max((i + 1 for i, token in enumerate(tokens) if token.endswith("</w>")), default=0)


def _weighted(conditioner: TextConditioner, text: Tensor, pair: tuple[_Chunk, ...]) -> Tensor:
    """The embeddings [t, d1 + d2] of a chunk, moved away from the empty prompt's by the weights."""
    if all(weight == 1 for chunk in pair for weight in chunk.weights):
        return text
    columns = []
    for chunk, encoder in zip(pair, conditioner.encoders, strict=True):
        weights = [1.0, *chunk.weights]  # after the mark of the start
        weights += [1.0] * (conditioner.tokens - len(weights))
        columns.append(text.new_tensor(weights)[:, None].expand(-1, encoder.config.hidden_size))
    empty, _ = conditioner.encode_ids(((), ()))
    return empty + torch.cat(columns, dim=1) * (text - empty)
