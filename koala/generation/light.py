"""A pipeline without PyTorch, which OpenVINO runs. Importing this loads no torch."""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from koala.checkpoints.tokenizer_file import Reader as FileReader
from koala.checkpoints.words import words_in
from koala.generation.denoise import Condition
from koala.generation.drawing import Drawing
from koala.generation.form import Form, network_file, tokenizer_file
from koala.generation.noise import NumpyNoise
from koala.generation.pixels import finished
from koala.generation.prompts import CACHED_CHUNKS
from koala.generation.requests import Known, Loras
from koala.generation.runtime.compiled import Compiled
from koala.generation.runtime.fixed_batches import ROWS, in_fixed_batches, one_by_one
from koala.utils.arrays import Array
from koala.utils.device import share_one_heap
from koala.utils.extras import require


class LightPipeline(Drawing):
    """The form in a folder (`koala.generation.form`), ready to draw.

    It draws what `koala.generation.pipeline.Pipeline` draws with the same backend, within 1e-4.
    It has no LoRAs, ControlNets or IP-Adapters and starts from no images: they need PyTorch.
    UserError for a folder that is not whole, and where OpenVINO is missing.
    """

    plan = None
    takes_loras = takes_images = takes_control = False
    batch_sizes = ROWS

    def __init__(self, folder: Path, name: str | None = None) -> None:
        require("drawing without PyTorch", "openvino", "openvino", "tokenizers")
        share_one_heap()  # 314 instead of 355 MB for koala-mini-guided
        self.form = form = Form.read(folder)
        self.name = name or form.name
        self.scheduler_config, self.zeros_for_empty = form.scheduler, form.zeros_for_empty
        self.words = words_in(folder)
        half = form.backend == "openvino-bf16"
        self.conditioner = LightConditioner(folder, form)
        unet = Compiled(network_file(folder, "unet"), half)
        decoder = Compiled(network_file(folder, "vae_decoder"), half)

        def predict(x: Array, timesteps: Array, condition: Condition) -> Array:
            given = (x, timesteps, condition.text, condition.pooled, condition.time_ids)
            kinds = (np.float32, np.int64, *3 * (np.float32,))
            parts = zip(given, kinds, strict=True)
            return unet(*(np.ascontiguousarray(part, kind) for part, kind in parts))[0]

        def decode(latents: Array) -> Array:
            (pixels,) = decoder((latents / form.latent_factor).astype(np.float32))
            return finished(pixels, latents)

        self.predict = in_fixed_batches(predict)
        self.decode = one_by_one(decode)

    def encode(self, pixels: Array) -> Array:
        raise NotImplementedError  # `requests` refuses images

    @property
    def factor(self) -> int:
        return self.form.factor

    @property
    def channels(self) -> int:
        return self.form.channels

    @property
    def known(self) -> Known:
        return Known.of_form(self.form, self.name, self.words)

    def own(self, array: Array) -> np.ndarray:
        return np.asarray(array, np.float32)

    def noise(self, seed: int, shape: tuple[int, ...]) -> NumpyNoise:
        return NumpyNoise(seed, shape)

    def use_loras(self, lora: Loras) -> None:
        assert not lora  # `requests` refuses them


class LightConditioner:
    """Both text encoders; in float32 also where the U-Net is run in bfloat16."""

    def __init__(self, folder: Path, form: Form) -> None:
        self.tokens, self.widths = form.tokens, form.widths
        files = FileReader()
        first, second = (Reader(tokenizer_file(folder, n), files) for n in ("", "_2"))
        self.readers = (first, second)
        self._special = form.special
        self._encoders = [Compiled(network_file(folder, f"text_encoder{n}")) for n in ("", "_2")]
        self.encode_ids = lru_cache(CACHED_CHUNKS)(self._encode)

    def _encode(
        self, ids: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray]:
        outputs = []
        for encoder, own, (start, end, padding) in zip(
            self._encoders, ids, self._special, strict=True
        ):
            row = [start, *own, end]
            row += [padding] * (self.tokens - len(row))
            outputs.append(encoder(np.array([row], np.int64)))
        first, second = outputs
        text = np.concatenate([first[-2][0], second[-2][0]], axis=-1)  # of the last layer but one
        return text, second[0][0]


class Reader:
    """Text to tokens, by the package tokenizers."""

    def __init__(self, file: Path, files: FileReader) -> None:
        self._file, self._files = file, files

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._files.tokenizer(self._file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def names(self, ids: Any) -> list[str]:
        return [self._tokenizer.id_to_token(one) for one in ids]
