"""A model's parts on torch's meta device: what weights and work take, before any is loaded.

Built from the folder's configs, in any dtype, quantised or not. Weights are counted to the byte;
the memory of the work is found by running it (`koala.generation.memory.peak`).
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koala.architectures.config import pooled_width
from koala.architectures.table import FACTOR, LATENT_CHANNELS
from koala.checkpoints.load import build_unet
from koala.checkpoints.validate import QUANTISED, read_json
from koala.generation.decode import tiny_folder
from koala.generation.memory.estimate import TEXT, UNET, VAE
from koala.generation.memory.peak import peak_bytes
from koala.generation.quantise import quantise
from koala.generation.row_tiling import decode_tiled, encode_tiled
from koala.generation.runtime.dtypes import DTYPES
from koala.utils.networks import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

TINY = "tiny VAE"

_DECODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "full": lambda vae, z: vae.decode(z).sample,
    "tiled": lambda vae, z: torch.cat([decode_tiled(vae, one[None]).float() for one in z]),
    "tiny": lambda vae, z: torch.cat([vae.decode(one[None]).sample.float() for one in z]),
}
_ENCODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {  # one image at a time
    "full": lambda vae, x: vae.encode(x).latent_dist.mode(),
    "tiled": encode_tiled,
}


class MetaModels:
    """The parts of a model folder, and the tiny autoencoder `tiny`, if any.

    size: of the images, (width, height) in pixels. images: how many at a time.
    """

    def __init__(
        self, folder: Path, tiny: str | Path | None, size: tuple[int, int], images: int
    ) -> None:
        self.folder, self.tiny, self.images = folder, tiny, images
        self.latents = (LATENT_CHANNELS, size[1] // FACTOR, size[0] // FACTOR)
        self.models = cache(self._models)
        self.work = cache(self._work)
        self.encoding = cache(self._encoding)

    def config(self, component: str) -> dict[str, Any]:
        return read_json(self.folder / component / "config.json")

    def _models(self, part: str, dtype: str, quantised: str | None = None) -> list[Any]:
        """The part's models, computing in `dtype` (a key of DTYPES), and stored in `quantised`."""
        with torch.device("meta"):
            models = self._built(part)
        for model in models:
            # diffusers' own `to` warns of an empty list of modules.
            nn.Module.to(model.eval().requires_grad_(False), DTYPES[dtype])
            if quantised:
                quantise(model, quantised)
        return models

    def _built(self, part: str) -> list[Any]:
        if part == UNET:
            config = self.config("unet")
            return [build_unet({k: v for k, v in config.items() if k != QUANTISED})]
        if part == VAE:
            return [AutoencoderKL.from_config(self.config("vae"))]
        if part == TINY:
            assert self.tiny is not None
            return [AutoencoderTiny.from_config(read_json(tiny_folder(self.tiny) / "config.json"))]
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        return [kind(CLIPTextConfig(**self.config(name))) for name, kind in kinds.items()]

    def _work(
        self, part: str, dtype: str, quantised: str | None = None, decoder: str | None = None
    ) -> int:
        """Most bytes alive while the part works, inputs and results included.

        The text encoders read one chunk of a prompt, the U-Net two rows for every image (with
        and without the prompt), the VAE decodes all of them in the way of `decoder`.
        """
        models, n = self.models(part, dtype, quantised), self.images
        (first, *_) = self.models(TEXT, "fp32")
        tokens = first.config.max_position_embeddings
        if part == TEXT:
            return max(peak_bytes(partial(_read, model, tokens)) for model in models)
        if part == UNET:
            return peak_bytes(partial(_predict, models[0], 2 * n, self.latents, tokens))
        assert decoder is not None
        return peak_bytes(partial(_decode, models[0], _DECODERS[decoder], (n, *self.latents)))

    def _encoding(self, dtype: str, encoder: str) -> int:
        """Most bytes alive while the VAE encodes one image, the image included."""
        (vae,), (_, h, w) = self.models(VAE, dtype), self.latents
        shape = (1, 3, FACTOR * h, FACTOR * w)
        return peak_bytes(lambda: _ENCODERS[encoder](vae, _blank(*shape, dtype=vae.dtype)))


def _read(encoder: Any, tokens: int) -> Any:
    return encoder(_blank(1, tokens, dtype=torch.int64), output_hidden_states=True)


def _predict(unet: Any, rows: int, latents: tuple[int, ...], tokens: int) -> Tensor:
    config, dtype = unet.config, unet.dtype
    pooled = pooled_width(config)
    return unet(
        _blank(rows, *latents, dtype=dtype),
        _blank(rows, dtype=torch.float32),
        encoder_hidden_states=_blank(rows, tokens, config.cross_attention_dim, dtype=dtype),
        added_cond_kwargs={
            "text_embeds": _blank(rows, pooled, dtype=dtype),
            "time_ids": _blank(rows, 6, dtype=torch.float32),
        },
    ).sample.float()


def _decode(model: Any, run: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    pixels = run(model, _blank(*shape, dtype=model.dtype)).float()
    return (pixels / 2 + 0.5).clamp(0, 1)


def _blank(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
