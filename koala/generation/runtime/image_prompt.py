"""IP-Adapters run by PyTorch: an image becomes tokens, which a U-Net's cross-attentions read.

Letters: n rows, t tokens of an image, d text width, p positions, w width of an attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koala.checkpoints.ip_adapter import TOKENS
from koala.generation.image_prompt import IPAdapter
from koala.utils.networks import Attention, UNet2DConditionModel


class ImageReader:
    """An IP-Adapter and its image encoder, on a U-Net's device, in its dtype."""

    def __init__(self, adapter: IPAdapter, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._encoder = adapter.encoder.load(dtype)
        nn.Module.to(self._encoder, device)
        self._projection = tuple(part.to(device, dtype) for part in adapter.file.projection())
        self._layers = {
            path: tuple(part.to(device, dtype) for part in adapter.file.layer(place))
            for path, place in adapter.takes.items()
        }

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What images [n, 3, s, s] become, and what stands for none, both [n, t, d].

        That is an embedding of zeros, as in diffusers.
        """
        found = self._encoder(pixels.to(self._device, self._dtype)).image_embeds
        return self._projected(found), self._projected(torch.zeros_like(found))

    def _projected(self, embedding: Tensor) -> Tensor:
        weight, bias, gain, shift = self._projection
        tokens = F.linear(embedding, weight, bias).unflatten(1, (TOKENS, -1))
        return F.layer_norm(tokens, gain.shape, gain, shift)

    @contextmanager
    def attached(self, unet: UNet2DConditionModel, tokens: Tensor, scale: Tensor) -> Iterator[None]:
        """Inside, the U-Net's cross-attentions read tokens [n, t, d] too, with scale [n]."""
        own: list[tuple[Any, Any]] = []
        tokens, scale = (part.to(self._device, self._dtype) for part in (tokens, scale))
        try:
            for path, (key, value) in self._layers.items():
                attention: Any = unet.get_submodule(path)
                own.append((attention, attention.processor))
                keys, values = F.linear(tokens, key), F.linear(tokens, value)
                attention.processor = _WithImage(keys, values, scale[:, None, None])
            yield
        finally:
            for attention, processor in own:
                attention.processor = processor


class _WithImage:
    """A cross-attention that attends to an image's tokens besides the text (section 3.2.2).

    z = attention(q, k, v) + scale * attention(q, k', v'), then the output's projection.
    """

    def __init__(self, key: Tensor, value: Tensor, scale: Tensor) -> None:
        self._key, self._value, self._scale = key, value, scale  # [n, t, w] twice, [n, 1, 1]

    def __call__(
        self, attention: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert attention_mask is None  # SDXL's text has none

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attention.heads, -1)).transpose(1, 2)

        query = heads(attention.to_q(hidden_states))

        def attended(key: Tensor, value: Tensor) -> Tensor:
            found = F.scaled_dot_product_attention(query, heads(key), heads(value))
            return found.transpose(1, 2).flatten(2)  # [n, p, w]

        text = attended(
            attention.to_k(encoder_hidden_states), attention.to_v(encoder_hidden_states)
        )
        out: Tensor = attention.to_out[0](text + self._scale * attended(self._key, self._value))
        return out
