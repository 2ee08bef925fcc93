"""Prepared latents as an endless, ordered stream of batches: the training data of every U-Net.

`koala.data.sampler` chooses a batch's samples and `koala.data.index` reads them; this module builds
the batch with its captions and draws, and reads ahead in a thread.
"""

import contextlib
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from koala.data.captions import CaptionFitter
from koala.data.encoding import (
    MIRRORED,
    NEGLIGIBLE,
    PROBE,
    Moments,
    difference,
    encoder_hash,
)
from koala.data.index import Index
from koala.data.items import repeats_of
from koala.data.sampler import WINDOW, BatchOrder
from koala.data.shard_cache import BatchShare, ShardCache
from koala.errors import UserError
from koala.text_conditioning import time_ids

AHEAD = 4  # batches read ahead
SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)  # captions that mirroring would falsify

Wanted = tuple[int, int, int, int]  # first, count, rank, world


class LatentSet:
    """A split of a prepared folder. Its only state is the number of samples seen.

    A batch's samples, captions and draws from the posterior depend only on the seed and on the
    samples' numbers in the stream, whatever was read before and however many processes share it.

    If the folder was prepared with `mirror`, half of the "train" samples are mirrored, except
    under a caption that says left or right. Crops are central, so their coordinates stay.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Path,
        mix: Mapping[str, int] | None = None,
        captions: Mapping[str, float] | None = None,
        seed: int = 0,
        *,
        split: str = "train",
        size: int | None = None,
        long_captions: str = "sentences",
        window: int = WINDOW,
    ):
        """Opens a folder made by `koala prepare`, or the fsspec URL of one.

        Args:
            model: a model folder; its VAE must be the one that made the latents, and its
                tokenizers decide which captions are too long.
            mix: how often an epoch shows the samples of each kind, e.g. {"emoji": 3, "scene": 1};
                other kinds are not shown. None: all once, but for folders that repeat their
                images (`koala.data.sources.folder`).
            captions: captions to choose from, with weights. None: the only one.
            split: "train", or a held-out split.
            size: required size in pixels (side of the square bucket); None accepts any.
            long_captions: policy for captions that are too long, see `koala.data.captions`.
            window: shards whose samples are shuffled together, see `koala.data.sampler`. For a
                remote folder this many shards per bucket are cached locally, and a few more.

        Raises:
            UserError: the folder is incomplete, of another VAE or size, or has no such samples.
        """
        self.index = Index(folder)
        self.captions = self._chosen_captions(captions)
        self._check_made(model, size)
        kinds = self.index.kinds(split)
        if mix is None and split == "train" and any(repeats_of(kind) > 1 for kind in kinds):
            mix = {kind: repeats_of(kind) for kind in kinds}
        parts = {None: 1} if mix is None else dict(mix)
        shards = np.concatenate(
            [np.repeat(self.index.select(split, kind), n) for kind, n in parts.items()]
        )
        if not len(shards):
            wanted = "" if mix is None else f" of the kinds {', '.join(mix)}"
            instead = (
                f": mix those, as in --set mixture.kinds={kinds[0]}:1" if mix and kinds else ""
            )
            raise UserError(
                f"{folder}: no samples of the split {split}{wanted}; there are "
                f"{', '.join(self.index.summary.samples) or 'none'}{instead}"
            )
        pairs = np.stack([self.index.height[shards], self.index.width[shards]])
        _, buckets = np.unique(pairs, axis=1, return_inverse=True)
        self.buckets = len(np.unique(buckets))  # sizes of images that there are
        self.order = BatchOrder(shards, self.index.rows[shards], buckets.reshape(-1), seed, window)
        self.seed = seed
        self.mirror = split == "train" and self.index.made_with.get("mirror", False)
        self._cache = ShardCache(self.index, self.order)
        self._fitter = CaptionFitter.of(model, long_captions)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="latents")
        self._coming: OrderedDict[Wanted, Future[dict[str, Any]]] = OrderedDict()

    @property
    def images(self) -> bool:
        """Whether the folder holds images, which the training encodes, instead of latents."""
        return self.index.made_with["encoder"] is None

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch, counting copies."""
        return self.order.epoch_length

    def batch(self, first: int, count: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """A rank's share of the samples first..first+count-1 of the stream.

        All are of one bucket. `first` must be a multiple of `count`, and `count` of `world`; the
        shares of all ranks, side by side, are the batch of one.

        Returns:
            "latents": float32 [n, 4, h/8, w/8], n = count / world, or "pixels": uint8
            [n, 3, h, w] if the folder holds images; "captions": n strings; "time_ids": float32
            [n, 6]; and "text" [n, t, d] and "pooled" [n, p], float32, if it holds embeddings.

        Raises:
            Failure: a shard is missing, or a latent is not finite.
        """
        assert first % count == 0 and count % world == 0 and 0 <= rank < world
        wanted = [(first + i * count, count, rank, world) for i in range(AHEAD + 1)]
        for key in [key for key in self._coming if key not in wanted]:
            self._coming.pop(key).cancel()
        for key in wanted:
            if key not in self._coming:
                self._coming[key] = self._reader.submit(self._read, *key)
        return self._coming.pop(wanted[0]).result()

    def stratified(self, count: int) -> list[dict[str, Any]]:
        """Batches of at most `count` samples, one of each bucket, as of `batch`: a fixed choice.

        Each sample comes once, and each bucket in proportion to its size.
        """
        batches, first = [], 0
        for places in self.order.stratified(count):
            batches.append(self._batch(places, first))
            first += len(places)
        return batches

    def close(self) -> None:
        """Stops reading ahead and removes downloaded shards."""
        self._reader.shutdown(cancel_futures=True)
        self.index.files.close()

    def _read(self, first: int, count: int, rank: int, world: int) -> dict[str, Any]:
        share = count // world
        part = BatchShare(count, rank, world)
        self._cache.advance_to(first // count, part)
        return self._batch(part.of(self.order.batch(first // count, count)), first + rank * share)

    def _batch(self, places: list[tuple[int, int]], first: int) -> dict[str, Any]:
        """The samples at these places of one bucket; first: number of the first in the stream."""
        images, latents, text, captions, sizes = [], [], [], [], []
        for number, (shard, row) in enumerate(places, first):
            rng = np.random.default_rng((self.seed, 3, number))
            tensors = self.index.tensors(shard, row)
            noise = None  # of the draw from the posterior
            if "mean" in tensors:
                shape = tensors["mean"].shape
                noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
            captions.append(self._caption(shard, row, rng))
            mirrored = self.mirror and not SIDED.search(captions[-1]) and rng.random() < 0.5
            if "pixels" in tensors:
                images.append(tensors["pixels"].flip(-1) if mirrored else tensors["pixels"])
            else:
                latents.append(_latents(tensors, noise, MIRRORED if mirrored else ""))
            if "text" in tensors:
                text.append((tensors["text"].float(), tensors["pooled"].float()))
            facts = (self.index.fact(shard, row, n) for n in ("height", "width", "top", "left"))
            sizes.append(tuple(facts))
        target = self.index.bucket(places[0][0])
        batch = {
            **({"pixels": torch.stack(images)} if images else {}),
            **({"latents": torch.stack(latents)} if latents else {}),
            "captions": captions,
            "time_ids": time_ids(
                [s[:2] for s in sizes], [s[2:] for s in sizes], [target] * len(sizes)
            ),
        }
        if text:
            batch["text"] = torch.stack([t for t, _ in text])
            batch["pooled"] = torch.stack([p for _, p in text])
        return batch

    def _caption(self, shard: int, row: int, rng: np.random.Generator) -> str:
        weights = np.array([*self.captions.values()])
        name = str(rng.choice([*self.captions], p=weights / weights.sum()))
        return self._fitter.fit(self.index.caption(shard, row, name), rng)

    def _chosen_captions(self, captions: Mapping[str, float] | None) -> dict[str, float]:
        there = self.index.captions
        if captions is None and len(there) == 1:
            return {there[0]: 1.0}
        if missing := [name for name in captions or {} if name not in there]:
            raise UserError(
                f"{self.index.files.folder}: no captions {', '.join(missing)}; there are "
                f"{', '.join(there)}: weigh those, as in --set mixture.captions={there[0]}:1"
            )
        if not captions or min(captions.values()) < 0 or not sum(captions.values()) > 0:
            raise UserError(
                f"{self.index.files.folder} has the captions {', '.join(there)}: give "
                "each a weight, 0 or more, not all 0"
            )
        return dict(captions)

    def _check_alike(self, model: Path, hashes: str) -> None:
        """UserError unless another VAE makes the same latents as the model's, nearly."""
        folder, far = self.index.files.folder, None
        with contextlib.suppress(FileNotFoundError):  # of a folder made by koala 0.1
            far = _difference(self.index.files.table(PROBE), model)
        if far is None or far >= NEGLIGIBLE:
            measured = (
                "" if far is None else f"; they differ by {far:.2g} of the posterior's deviation"
            )
            raise UserError(
                f"{folder} holds latents of another VAE ({hashes}){measured}; prepare into another "
                f"folder with --model {model}"
            )
        if os.environ.get("RANK", "0") == "0":
            print(
                f"koala: {folder} holds latents of another VAE ({hashes}), which differ from this "
                f"model's by {far:.2g} of the posterior's deviation: little enough to be used",
                file=sys.stderr,
            )

    def _check_made(self, model: Path, size: int | None) -> None:
        made, folder = self.index.made_with, self.index.files.folder
        if not self.images and (own := encoder_hash(model)) != made["encoder"]:
            self._check_alike(model, f"{made['encoder']}, this model's is {own}")
        if size is not None and size != made["size"]:
            raise UserError(
                f"{folder} holds latents for {made['size']} pixels, this training is for {size}; "
                f"prepare into another folder with --size {size}"
            )


@cache
def _difference(probe: Path, model: Path) -> float:
    """Between the VAE that left a probe and a model's, `koala.data.encoding.difference`."""
    found = load_file(probe)
    return difference(found, Moments(model, "cpu").probe()["mean"])


def _latents(tensors: dict[str, Tensor], noise: Tensor | None, which: str) -> Tensor:
    """float32 [4, h/8, w/8]: the stored draw, or one from the moments. which: name prefix."""
    if noise is None:
        return tensors[which + "draw"].float()
    return tensors[which + "mean"].float() + tensors[which + "deviation"].float() * noise
