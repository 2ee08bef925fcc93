"""The illustrations' own evaluation: held-out pairs as prompts, real pictures, a judge's training.

The prompts are captions of held-out real images whose concept and style both occur in training,
but never together. Importing this loads no torch.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from koala.data.illustrations.images import ImageSet, shards_at
from koala.errors import UserError
from koala.evaluation.pictures import RealPictures, stamp
from koala.evaluation.prompts import Prompt, PromptSet

KIND = "emoji"
JUDGE_IMAGES = 4000  # at most: features take under two minutes of a core


def choose(real: ImageSet, prompts: int) -> tuple[list[int], list[int], list[int]]:
    """Row indices of the prompts' images, the reference and the judge's training set.

    Ordered by the hash of the id, so that the order and number of images do not matter. No
    caption occurs twice among the prompts. The reference is all held-out images, with those of
    the prompts. UserError if there are too few of any.
    """

    def by_hash(indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda i: sha256(real.rows[i]["id"].encode()).digest())

    pairs = by_hash(real.select(split="test-pair", kind=KIND))
    first_of_text: dict[str, int] = {}
    for i in pairs:
        first_of_text.setdefault(real.rows[i]["short"], i)
    chosen = list(first_of_text.values())[:prompts]
    if len(chosen) < prompts:
        raise UserError(
            f"{prompts} prompts requested, but {real.folder} has {len(chosen)} held-out pairs "
            f"(split test-pair, kind {KIND}): use a smaller --count, or prepare more pictures"
        )
    reference = pairs + by_hash(real.select(split="test-concept", kind=KIND))
    train = by_hash(real.select(split="train", kind=KIND))[:JUDGE_IMAGES]
    if len(train) < prompts or len({real.rows[i]["concept"] for i in train}) < 2:
        raise UserError(
            f"{real.folder} has {len(train)} pictures to train the judge on (split train, kind "
            f"{KIND}); it needs at least as many as prompts ({prompts}) and two concepts: "
            "prepare more pictures"
        )
    return chosen, reference, train


def held_out_prompts(folder: Path, count: int) -> tuple[PromptSet, RealPictures, tuple[int, ...]]:
    """The prompts, the real pictures, and the rows that a judge is trained on."""
    images = ImageSet(folder)
    chosen, reference, train = choose(images, count)
    prompts = tuple(Prompt(images.rows[i]["id"], images.rows[i]["short"]) for i in chosen)
    real = RealPictures(
        str(folder),
        images.image,
        tuple(reference),
        tuple(chosen),
        tuple(train[: len(chosen)]),
        stamp(shards_at(folder)),
    )
    return PromptSet("illustrations", prompts), real, tuple(train)
