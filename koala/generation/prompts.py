"""Embeddings of prompts of any length, with weights.

The text encoders read a fixed number of tokens at a time; longer prompts are encoded in chunks,
whose embeddings are concatenated. `koala.generation.prompt_syntax` has the syntax of weights.

A weight w moves a token's embedding away from that of the empty prompt at the same position: e0 +
w (e - e0), as in ComfyUI and, for weights above 1, in compel. AUTOMATIC1111 scales e itself and
restores the mean over the prompt, so that each weighted word changes all the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Protocol, TypeAlias

import numpy as np

from koala.generation.prompt_embeddings import split_names
from koala.generation.prompt_syntax import Fragment, parse
from koala.utils.arrays import Array, joined, like

Ids: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # for each encoder
NONE: Mapping[str, Ids] = MappingProxyType({})


class Tokenizer(Protocol):
    """Text to tokens, without the special ones."""

    def ids(self, text: str) -> list[int]:
        """The text's token ids."""

    def names(self, ids: Sequence[int]) -> list[str]:
        """The tokens, of which a word's last ends in "</w>"."""


class Encoder(Protocol):
    """Both text encoders; `koala.text_conditioning.TextConditioner` is one."""

    tokens: int  # t, that they read at a time

    @property
    def readers(self) -> tuple[Tokenizer, Tokenizer]:
        """The tokenizer of each."""

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of the embeddings of each."""

    def encode_ids(self, ids: Ids) -> tuple[Array, Array]:
        """Embeddings [t, d1 + d2] and pooled [p] of at most t - 2 tokens for each encoder."""


CACHED_CHUNKS = 64  # chunks of prompts whose embeddings are kept


@dataclass(frozen=True)
class PromptEmbedding:
    """One prompt as the U-Net reads it; t is a multiple of a chunk's tokens."""

    text: Array  # [1, t, d]
    pooled: Array  # [1, p]


def encode(
    conditioner: Encoder, prompt: str, embeddings: Mapping[str, Ids] = NONE
) -> PromptEmbedding:
    """The embedding of a whole prompt; `pooled` is that of its first chunk.

    embeddings: lower-case name of a textual inversion -> ids of its vectors, which take the place
    of the name. Chunks are split between words, unless a single word fills one. A prompt without
    brackets that fits into one chunk has exactly the embedding it has in training. UserError as
    from `parse`.
    """
    parts = parse(prompt)
    sides = []
    for side, tokenizer in enumerate(conditioner.readers):
        own = {name: ids[side] for name, ids in embeddings.items()}
        sides.append(_chunks(parts, tokenizer, conditioner.tokens - 2, own))
    texts, pooled = [], []
    for pair in zip_longest(*sides, fillvalue=_Chunk((), ())):
        text, of_all = conditioner.encode_ids((pair[0].ids, pair[1].ids))
        texts.append(_weighted(conditioner, text, pair))
        pooled.append(of_all)
    return PromptEmbedding(joined(texts)[None], pooled[0][None])


def padded(conditioner: Encoder, encoded: PromptEmbedding, tokens: int) -> PromptEmbedding:
    """The same, `tokens` long, with chunks of the empty prompt at the end."""
    missing = (tokens - encoded.text.shape[1]) // conditioner.tokens
    empty, _ = conditioner.encode_ids(((), ()))
    return PromptEmbedding(joined([encoded.text[0], *[empty] * missing])[None], encoded.pooled)


@dataclass(frozen=True)
class _Chunk:
    """Tokens that an encoder reads at once, without the special tokens, and their weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def _chunks(
    parts: list[list[Fragment]],
    tokenizer: Tokenizer,
    length: int,
    embeddings: Mapping[str, tuple[int, ...]],
) -> list[_Chunk]:
    chunks = []
    for part in parts:
        ids: list[int] = []
        weights: list[float] = []
        ends: list[bool] = []  # whether a word ends with the token
        for fragment in part:
            for i, piece in enumerate(split_names(fragment.text, embeddings)):
                if i % 2:
                    more = [*embeddings[piece.lower()]]
                    ends += [False] * (len(more) - 1) + [True]
                else:
                    more = tokenizer.ids(piece)
                    ends += [token.endswith("</w>") for token in tokenizer.names(more)]
                ids += more
                weights += [fragment.weight] * len(more)
        while len(ids) > length:
            end = max((i + 1 for i in range(length) if ends[i]), default=length)
            chunks.append(_Chunk(tuple(ids[:end]), tuple(weights[:end])))
            del ids[:end], weights[:end], ends[:end]
        chunks.append(_Chunk(tuple(ids), tuple(weights)))
    return chunks


def _weighted(conditioner: Encoder, text: Array, pair: tuple[_Chunk, ...]) -> Array:
    """The embeddings [t, d1 + d2] of a chunk, moved away from the empty prompt's by the weights."""
    if all(weight == 1 for chunk in pair for weight in chunk.weights):
        return text
    columns = []
    for chunk, width in zip(pair, conditioner.widths, strict=True):
        weights = [1.0, *chunk.weights]  # of the start token
        weights += [1.0] * (conditioner.tokens - len(weights))
        columns.append(np.repeat(np.array(weights)[:, None], width, axis=1))
    empty, _ = conditioner.encode_ids(((), ()))
    return empty + like(text, np.concatenate(columns, axis=1)) * (text - empty)
