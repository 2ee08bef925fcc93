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
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from koala.conditioning import TextConditioner
from koala.errors import UserError

ROUND, SQUARE = 1.1, 1 / 1.1
MOST_WEIGHT = 10.0

_MARKS = re.compile(
    r"\\[()\[\]\\]"  # an escaped character
    r"|[(\[\])]"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|\s*\bBREAK\b\s*"
    r"|[^\\()\[\]:B\s]+|."  # text: a run of plain characters, or any other one
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
    found: list[tuple[str | None, float]] = []  # texts with their weights; None is a BREAK
    opened: list[tuple[str, int]] = []  # brackets, and what they begin with
    for mark in _MARKS.finditer(prompt):
        token = mark[0]
        if token.strip() == "BREAK":
            found.append((None, 1.0))
        elif token in ("(", "["):
            opened.append((token, len(found)))
        elif token == "]" and opened and opened[-1][0] == "[":
            _weigh(found, opened.pop()[1], SQUARE)
        elif (token == ")" or mark["weight"]) and opened and opened[-1][0] == "(":
            _weigh(found, opened.pop()[1], float(mark["weight"] or ROUND))
        else:
            escaped = len(token) == 2 and token[0] == "\\"
            found.append((token[1:] if escaped else token, 1.0))
    for bracket, start in opened:
        _weigh(found, start, ROUND if bracket == "(" else SQUARE)
    return _parts(found)


def _weigh(found: list[tuple[str | None, float]], start: int, weight: float) -> None:
    """Multiplies the weights of everything from `start` on."""
    found[start:] = [(text, old * weight) for text, old in found[start:]]


def _parts(found: list[tuple[str | None, float]]) -> list[list[Fragment]]:
    """Split at the BREAKs; neighbours of one weight joined; empty parts left out, all but one."""
    parts: list[list[Fragment]] = [[]]
    for text, weight in found:
        if not 0 <= weight <= MOST_WEIGHT:
            raise UserError(
                f"the prompt gives {text!r} the weight {weight:g}: allowed are weights from 0 to "
                f"{MOST_WEIGHT:g}, 1.3 is a strong one"
            )
        if text is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == weight:
            parts[-1][-1] = Fragment(parts[-1][-1].text + text, weight)
        else:
            parts[-1].append(Fragment(text, weight))
    return [part for part in parts if part] or [[]]


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
        text, of_all = conditioner.read((pair[0].ids, pair[1].ids))
        texts.append(_weighted(conditioner, text, pair))
        pooled.append(of_all)
    return Encoded(torch.cat(texts)[None], pooled[0][None])


def padded(conditioner: TextConditioner, encoded: Encoded, tokens: int) -> Encoded:
    """The same, `tokens` long, with chunks of the empty prompt at the end."""
    missing = (tokens - encoded.text.shape[1]) // conditioner.tokens
    empty, _ = conditioner.read(((), ()))
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
    empty, _ = conditioner.read(((), ()))
    return empty + torch.cat(columns, dim=1) * (text - empty)
