"""What the U-Net is told besides the noisy latent: the prompt's embeddings and the time ids.

Training, generation and evaluation must tell it in exactly the same way, or guidance and
micro-conditioning silently mean different things in each; so the convention lives here once.

Letters: n prompts, t tokens the encoders read, d1 and d2 the encoders' widths, p pooled width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from koala.checkpoints.load import load_text
from koala.errors import UserError

if TYPE_CHECKING:  # loaded with the encoders: data that bring their text need none of it
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedTokenizerBase,
    )

Pair = tuple[int, int]
Ids = tuple[tuple[int, ...], tuple[int, ...]]  # token ids for each encoder, without its marks


class TextConditioner:
    """Prompts to SDXL's text embeddings (arXiv 2307.01952, section 2.1).

    The penultimate hidden states of both CLIP text encoders, side by side, and the second
    encoder's projected pooled output. The encoders are frozen here.

    An embedding is a function of its tokens alone: they are encoded prompt by prompt, because a
    batch's shape changes the last bits of its rows, and then a resumed training would differ
    from an uninterrupted one by what its memo happened to hold. Without a memo prompts are encoded
    together, which a GPU does many times faster.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        memo: int = 1024,
    ) -> None:
        """Takes what `checkpoints.load.load_text` returns; `memo`: prompts remembered, at most."""
        assert memo >= 0
        self.tokenizers = (tokenizer, tokenizer_2)
        self.encoders = (
            text_encoder.eval().requires_grad_(False),
            text_encoder_2.eval().requires_grad_(False),
        )
        self.tokens = _tokens(self.tokenizers, self.encoders)
        self.width = sum(encoder.config.hidden_size for encoder in self.encoders)
        self.pooled_width: int = text_encoder_2.config.projection_dim
        self._memo_limit = memo
        self._memo: OrderedDict[Ids, tuple[Tensor, Tensor]] = OrderedDict()

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memo: int = 1024,
    ) -> TextConditioner:
        """The conditioner of a pipeline folder, its encoders on `device` in `dtype`."""
        tokenizer, tokenizer_2, text_encoder, text_encoder_2 = load_text(folder, dtype)
        return cls(
            tokenizer, tokenizer_2, text_encoder.to(device), text_encoder_2.to(device), memo=memo
        )

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoders[0].dtype

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [n, t, d1 + d2] and pooled [n, p], in the encoders' dtype and device.

        Reads the first t tokens of each prompt and no further: training's way. Generation reads
        the rest in chunks (`koala.generation.prompts`). No gradients. The tensors are the
        caller's own.
        """
        if not prompts:
            return self.zeros(0)
        ids = [self._first_ids(prompt) for prompt in prompts]
        if not self._memo_limit:
            return self._encode(ids)
        rows = [self.read(one) for one in ids]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def zeros(self, n: int) -> tuple[Tensor, Tensor]:
        """The unconditional embedding, [n, t, d1 + d2] and [n, p] of zeros.

        SDXL pipelines put zeros where there is no negative prompt
        (`force_zeros_for_empty_prompt`), so a caption dropped in training is zeros as well.
        """
        return (
            torch.zeros(n, self.tokens, self.width, dtype=self.dtype, device=self.device),
            torch.zeros(n, self.pooled_width, dtype=self.dtype, device=self.device),
        )

    def forget(self) -> None:
        """Empties the memo: to be called whenever the encoders have changed, as by a LoRA."""
        self._memo.clear()

    def read(self, ids: Ids) -> tuple[Tensor, Tensor]:
        """Embeddings [t, d1 + d2] and pooled [p] of at most t - 2 tokens for each encoder.

        Remembered: not to be written to. No gradients.
        """
        found = self._memo.pop(ids, None)
        if found is None:
            text, pooled = self._encode([ids])
            found = text[0], pooled[0]
        self._memo[ids] = found
        if len(self._memo) > self._memo_limit:
            self._memo.popitem(last=False)
        return found

    def _first_ids(self, prompt: str) -> Ids:
        first, second = (
            tuple(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
            for tokenizer in self.tokenizers
        )
        room = self.tokens - 2  # the start and end marks take two places
        return first[:room], second[:room]

    # Not inference mode, even inside a caller's: the memo outlives it and feeds training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        hidden = []
        for n, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.encoders, strict=True)):
            marked = [[tokenizer.bos_token_id, *ids[n], tokenizer.eos_token_id] for ids in prompts]
            padded = [row + [tokenizer.pad_token_id] * (self.tokens - len(row)) for row in marked]
            places = torch.tensor(padded, device=self.device)
            assert places.shape[1] == self.tokens
            output = encoder(places, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, dim=-1), output.text_embeds


def time_ids(original: Sequence[Pair], crop: Sequence[Pair], target: Sequence[Pair]) -> Tensor:
    """SDXL's size and crop micro-conditioning (arXiv 2307.01952, section 2.2), float32 [n, 6].

    Row i is original (height, width), crop (top, left), target (height, width), in pixels.
    """
    rows = [(*a, *b, *c) for a, b, c in zip(original, crop, target, strict=True)]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)


def _tokens(
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
) -> int:
    """How many tokens both encoders read, once it is sure that they agree."""
    first, second = (tokenizer.model_max_length for tokenizer in tokenizers)
    places = min(encoder.config.max_position_embeddings for encoder in encoders)
    if first != second or first > places:
        raise UserError(
            f"the tokenizers cut at {first} and {second} tokens, the text encoders have {places} "
            "places; an SDXL pipeline has one length for all: set model_max_length in both "
            "tokenizer_config.json"
        )
    return first
