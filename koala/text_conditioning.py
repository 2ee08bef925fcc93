"""The U-Net's conditioning: text embeddings of the prompt, and the time ids.

Training, generation and evaluation must condition the U-Net in exactly the same way, or guidance
and micro-conditioning mean something different in each. So the convention lives here, once.

Letters: n prompts, t tokens the encoders read, d1 and d2 the encoders' widths, p pooled width.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from koala.architectures import time_ids as sizes
from koala.architectures.time_ids import Pair
from koala.checkpoints.load import Layer, load_text
from koala.errors import UserError

if TYPE_CHECKING:  # loaded with the encoders; data with stored embeddings need neither
    from koala.utils.networks import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedTokenizerBase,
    )

ADDED = 1 << 24  # ids from here on are of vectors that `TextConditioner.add_vectors` was given
Ids = tuple[tuple[int, ...], tuple[int, ...]]  # token ids for each encoder, without special tokens


class TokenReader:
    """Text to tokens, without the special ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    def names(self, ids: Sequence[int]) -> list[str]:
        found: Any = self.tokenizer.convert_ids_to_tokens([*ids])
        return found


class TextConditioner:
    """Encodes prompts into SDXL's text embeddings (arXiv 2307.01952, section 2.1).

    The embeddings are the penultimate hidden states of both CLIP text encoders, concatenated, and
    the second encoder's projected pooled output. The encoders are frozen.

    With a cache, prompts are encoded in groups of one size, filled up with empty prompts, so that
    an embedding depends on its tokens alone: the batch's shape changes the last bits of its rows,
    and a resumed training would differ from an uninterrupted one by what the cache happened to
    hold. Without a cache, prompts are encoded together, which is many times faster on a GPU.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        cache_size: int = 1024,
        group: int = 1,
    ) -> None:
        """Takes what `load_text` returns.

        cache_size: prompts cached; 0: no cache. group: prompts encoded at once, with a cache; more
        than one where most calls bring several new prompts, as in training.
        """
        assert cache_size >= 0 and group >= 1
        self.tokenizers = (tokenizer, tokenizer_2)
        self.encoders = (
            text_encoder.eval().requires_grad_(False),
            text_encoder_2.eval().requires_grad_(False),
        )
        self.tokens = _tokens(self.tokenizers, self.encoders)
        self.width = sum(encoder.config.hidden_size for encoder in self.encoders)
        assert text_encoder_2.config.projection_dim is not None
        self.pooled_width: int = text_encoder_2.config.projection_dim
        self._cache_size = cache_size
        self._group = group
        self._cache: OrderedDict[Ids, tuple[Tensor, Tensor]] = OrderedDict()
        self._added: tuple[list[Tensor], list[Tensor]] = ([], [])  # [d1] and [d2]

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_size: int = 1024,
        group: int = 1,
        layer: Layer | None = None,
    ) -> TextConditioner:
        """The conditioner of a pipeline folder, its encoders on `device` in `dtype`."""
        tokenizer, tokenizer_2, text_encoder, text_encoder_2 = load_text(folder, dtype, layer)
        return cls(
            tokenizer,
            tokenizer_2,
            text_encoder.to(device),
            text_encoder_2.to(device),
            cache_size=cache_size,
            group=group,
        )

    @property
    def widths(self) -> tuple[int, int]:
        """d1 and d2."""
        first, second = (encoder.config.hidden_size for encoder in self.encoders)
        return first, second

    @property
    def readers(self) -> tuple[TokenReader, TokenReader]:
        """The tokenizers, as generation reads prompts with them."""
        first, second = self.tokenizers
        return TokenReader(first), TokenReader(second)

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoders[0].dtype

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [n, t, d1 + d2] and pooled [n, p], in the encoders' dtype and device.

        Each prompt is truncated to t tokens, as in training; generation encodes longer prompts in
        chunks (`koala.generation.prompts`). No gradients. The tensors are the caller's own.
        """
        if not prompts:
            return self.zeros(0)
        ids = [self._first_ids(prompt) for prompt in prompts]
        if not self._cache_size:
            return self._encode(ids)
        rows = self._rows(ids)
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def zeros(self, n: int) -> tuple[Tensor, Tensor]:
        """The unconditional embedding, [n, t, d1 + d2] and [n, p] of zeros.

        SDXL pipelines use zeros when there is no negative prompt
        (`force_zeros_for_empty_prompt`), so a caption dropped in training is zeros as well.
        """
        return (
            torch.zeros(n, self.tokens, self.width, dtype=self.dtype, device=self.device),
            torch.zeros(n, self.pooled_width, dtype=self.dtype, device=self.device),
        )

    def clear_cache(self) -> None:
        """Empties the cache. Call it whenever the encoders have changed, for example by a LoRA."""
        self._cache.clear()

    def add_vectors(self, first: Tensor, second: Tensor) -> Ids:
        """Adds token embeddings [v, d1] and [v, d2] and returns the ids that stand for them."""
        ids = []
        for vectors, added in zip((first, second), self._added, strict=True):
            start = ADDED + len(added)
            added.extend(vectors)
            ids.append(tuple(range(start, start + len(vectors))))
        return ids[0], ids[1]

    def encode_ids(self, ids: Ids) -> tuple[Tensor, Tensor]:
        """Embeddings [t, d1 + d2] and pooled [p] of at most t - 2 tokens for each encoder.

        Cached, so do not write to them. No gradients.
        """
        return self._rows([ids])[0]

    def _rows(self, ids: Sequence[Ids]) -> list[tuple[Tensor, Tensor]]:
        """Each one's embeddings [t, d1 + d2] and [p], from the cache where they are there."""
        wanted = dict.fromkeys(ids)
        found = {one: self._cache.pop(one) for one in wanted if one in self._cache}
        missing = [one for one in wanted if one not in found]
        for first in range(0, len(missing), self._group):
            part = missing[first : first + self._group]
            empty: list[Ids] = [((), ())] * (self._group - len(part))
            for one, text, pooled in zip(part, *self._encode([*part, *empty]), strict=False):
                found[one] = text.clone(), pooled.clone()  # not views, which would keep the group
        self._cache.update((one, found[one]) for one in wanted)  # the newest last
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return [found[one] for one in ids]

    def _first_ids(self, prompt: str) -> Ids:
        first, second = (
            tuple(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
            for tokenizer in self.tokenizers
        )
        room = self.tokens - 2  # two special tokens, start and end
        return first[:room], second[:room]

    # Not inference mode, even inside a caller's: the cache outlives it and feeds training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        hidden = []
        for n, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.encoders, strict=True)):
            special = [[tokenizer.bos_token_id, *ids[n], tokenizer.eos_token_id] for ids in prompts]
            padded = [row + [tokenizer.pad_token_id] * (self.tokens - len(row)) for row in special]
            token_ids = torch.tensor(padded, device=self.device)
            assert token_ids.shape[1] == self.tokens
            with self._replaced(n, token_ids) as known:
                output = encoder(known, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, dim=-1), output.text_embeds

    @contextlib.contextmanager
    def _replaced(self, n: int, token_ids: Tensor) -> Iterator[Tensor]:
        """Token ids that encoder n knows; inside, it reads the added vectors in their places.

        Their own ids stay below the end token's, which some encoders find as the highest.
        """
        places = token_ids >= ADDED
        if not places.any():
            yield token_ids
            return
        vectors = torch.stack([self._added[n][i - ADDED] for i in token_ids[places].tolist()])

        def put(module: object, inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[places.to(output.device)] = vectors.to(output)
            return output

        handle = self.encoders[n].get_input_embeddings().register_forward_hook(put)
        try:
            yield token_ids.masked_fill(places, 0)
        finally:
            handle.remove()


def time_ids(original: Sequence[Pair], crop: Sequence[Pair], target: Sequence[Pair]) -> Tensor:
    """`koala.architectures.time_ids` as a tensor."""
    return torch.from_numpy(sizes.time_ids(original, crop, target))


def _tokens(
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
) -> int:
    """Number of tokens that both encoders read; `UserError` if they disagree."""
    first, second = (tokenizer.model_max_length for tokenizer in tokenizers)
    positions = min(encoder.config.max_position_embeddings for encoder in encoders)
    if first != second or first > positions:
        raise UserError(
            f"the tokenizers truncate at {first} and {second} tokens, the text encoders have "
            f"{positions} positions; an SDXL pipeline has one length: set model_max_length in both "
            "tokenizer_config.json"
        )
    return first
