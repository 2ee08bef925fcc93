"""Captions: composes them from fields, counts tokens, and fits long ones to the text encoders.

CLIP reads 77 tokens; the captions KOALA trained on have 81 words on average. None is truncated
silently: captions that are too long are counted when data are prepared, and a training shows whole
sentences that fit, by one of two policies:

    sentences   a random selection of sentences each time, in their order
    chunks      a random chunk of consecutive sentences each time; the chunks cover the caption
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

CLIP_TOKENS = 77  # CLIP's limit, if a tokenizer states none
POLICIES = ("sentences", "chunks")
_END = re.compile(r"(?<=[.!?;])\s+")


def compose(expression: str, fields: dict[str, str]) -> str:
    """The caption for an expression such as "alt_txt+llava_caption": its fields, joined.

    Missing fields are skipped; "" if all are missing. Each but the last gets a full stop if needed.
    """
    texts = [" ".join(fields[f].split()) for f in expression.split("+") if fields.get(f)]
    ended = [t if t[-1] in ".!?;," else f"{t}." for t in texts[:-1]]
    return " ".join([*ended, *texts[-1:]])


def check_expressions(expressions: Sequence[str], fields: Sequence[str]) -> None:
    """Raises UserError if an expression names a field that the source lacks."""
    for expression in expressions:
        if missing := [f for f in expression.split("+") if f not in fields]:
            raise UserError(
                f"caption {expression!r}: the source has no {', '.join(missing)}; its first "
                f"image has {', '.join(fields) or 'no captions'}"
            )
    if len({*expressions}) != len(expressions):
        raise UserError(f"captions {', '.join(expressions)}: one is given twice")


class CaptionFitter:
    """Fits captions to encoders that read at most `limit` tokens."""

    def __init__(self, count: Callable[[str], int], limit: int, policy: str):
        """count: a text's tokens, special tokens included. UserError for an unknown policy."""
        if policy not in POLICIES:
            raise unknown("policy for long captions", policy, POLICIES)
        self.count = lru_cache(maxsize=65_536)(count)
        self.limit, self.policy = limit, policy

    @classmethod
    def of(cls, model: Path, policy: str) -> CaptionFitter:
        """For the text encoders of a model folder, by the larger of its tokenizers' counts."""
        parts = [model / part for part in ("tokenizer", "tokenizer_2")]
        limits = [read_json(p / "tokenizer_config.json").get("model_max_length") for p in parts]

        @cache
        def tokenizers() -> list[Any]:  # loaded for the first long text
            from transformers import CLIPTokenizer

            return [CLIPTokenizer.from_pretrained(p, local_files_only=True) for p in parts]

        def count(text: str) -> int:
            return max(len(t(text, verbose=False).input_ids) for t in tokenizers())

        return cls(count, min(limit or CLIP_TOKENS for limit in limits), policy)

    def is_long(self, caption: str) -> bool:
        """Whether the encoders would truncate it."""
        # A token has at least one character, so most captions need no tokenizing.
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
        """Sentences; one that does not fit is split into runs of words, as long as possible."""
        pieces: list[str] = []
        for sentence in _END.split(caption):
            pieces += [sentence] if self._fits(sentence) else self._pack(sentence.split())
        return pieces

    def _pack(self, pieces: Sequence[str]) -> list[str]:
        """Joins neighbours while they fit; a word that does not fit is halved."""
        runs: list[str] = []
        for piece in pieces:
            if runs and self._fits(f"{runs[-1]} {piece}"):
                runs[-1] = f"{runs[-1]} {piece}"
            elif self._fits(piece) or len(piece) == 1:
                runs.append(piece)
            else:
                runs += self._pack([piece[: len(piece) // 2], piece[len(piece) // 2 :]])
        return runs
