"""Captions: which fields make one, how many tokens it has, and how a long one is told.

CLIP reads 77 tokens; the captions KOALA trained on have 81 words on average. Here none is cut in
silence: whatever is too long is counted while data are prepared, and told in parts while a model
learns. Either way a sample is told by whole sentences that fit.

    sentences   some of them, drawn anew each time, in their order
    chunks      one run of neighbours, drawn anew each time; together the runs are the whole caption
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.checkpoints.validate import read_json
from koala.errors import UserError, unknown

if TYPE_CHECKING:
    import numpy as np

CLIP_TOKENS = 77  # what CLIP reads, where a tokenizer does not say
POLICIES = ("sentences", "chunks")
_END = re.compile(r"(?<=[.!?;])\s+")


def compose(expression: str, fields: dict[str, str]) -> str:
    """The caption that "alt_txt+llava_caption" asks for: the fields one after the other.

    Absent fields are left out; "" where all are. Each but the last ends as a sentence does.
    """
    texts = [" ".join(fields[f].split()) for f in expression.split("+") if fields.get(f)]
    ended = [t if t[-1] in ".!?;," else f"{t}." for t in texts[:-1]]
    return " ".join([*ended, *texts[-1:]])


def check_expressions(expressions: Sequence[str], fields: Sequence[str]) -> None:
    """Raises UserError where an expression names a field that the source does not have."""
    for expression in expressions:
        if missing := [f for f in expression.split("+") if f not in fields]:
            raise UserError(
                f"caption {expression!r}: the source has no {', '.join(missing)}; its first "
                f"picture has {', '.join(fields) or 'no captions'}"
            )
    if len({*expressions}) != len(expressions):
        raise UserError(f"captions {', '.join(expressions)}: one is named twice")


class CaptionFitter:
    """How captions are told to encoders that read no more than `limit` tokens."""

    def __init__(self, count: Callable[[str], int], limit: int, policy: str):
        """count: a text's tokens, start and end included. UserError for an unknown policy."""
        if policy not in POLICIES:
            raise unknown("policy for long captions", policy, POLICIES)
        self.count = lru_cache(maxsize=65_536)(count)
        self.limit, self.policy = limit, policy

    @classmethod
    def of(cls, model: Path, policy: str) -> CaptionFitter:
        """As the text side of a model folder reads: the longer of its two tokenizers' counts."""
        parts = [model / part for part in ("tokenizer", "tokenizer_2")]
        limits = [read_json(p / "tokenizer_config.json").get("model_max_length") for p in parts]

        @cache
        def tokenizers() -> list[Any]:  # loaded when the first long text comes
            from transformers import CLIPTokenizer

            return [CLIPTokenizer.from_pretrained(p, local_files_only=True) for p in parts]

        def count(text: str) -> int:
            return max(len(t(text, verbose=False).input_ids) for t in tokenizers())

        return cls(count, min(limit or CLIP_TOKENS for limit in limits), policy)

    def is_long(self, caption: str) -> bool:
        """Whether the encoders would leave some of it unread."""
        # A token has at least one character, so most captions need no tokenizer.
        return len(caption) + 2 > self.limit and self.count(caption) > self.limit

    def fit(self, caption: str, rng: np.random.Generator) -> str:
        """The caption, or as much of it as fits, by the policy."""
        if not self.is_long(caption):
            return caption
        pieces = self._pieces(caption)
        if self.policy == "chunks":
            chunks = self._pack(pieces)
            return chunks[int(rng.integers(len(chunks)))]
        chosen: list[int] = []
        for i in rng.permutation(len(pieces)).tolist():
            if self._fits(" ".join(pieces[k] for k in sorted([*chosen, i]))):
                chosen.append(i)
        return " ".join(pieces[k] for k in sorted(chosen))

    def _fits(self, text: str) -> bool:
        return self.count(text) <= self.limit

    def _pieces(self, caption: str) -> list[str]:
        """Sentences; one that does not fit falls into runs of words, as long as they can be."""
        pieces: list[str] = []
        for sentence in _END.split(caption):
            pieces += [sentence] if self._fits(sentence) else self._pack(sentence.split())
        return pieces

    def _pack(self, pieces: Sequence[str]) -> list[str]:
        """Neighbours joined for as long as they fit; a word that does not is halved."""
        runs: list[str] = []
        for piece in pieces:
            if runs and self._fits(f"{runs[-1]} {piece}"):
                runs[-1] = f"{runs[-1]} {piece}"
            elif self._fits(piece) or len(piece) == 1:
                runs.append(piece)
            else:
                runs += self._pack([piece[: len(piece) // 2], piece[len(piece) // 2 :]])
        return runs
