"""Scaling on paper: what a step of KOALA-Lightning-700M computes, sends and reads on many GPUs.

`python -m benchmarks.scaling` prints the table of docs/training.md. Nothing in it is measured: all
follows from the architectures, the size of a prepared sample and the assumptions below.
"""

from dataclasses import dataclass

import numpy as np

from koala import recipes
from koala.architectures.flops import flops as forward_flops
from koala.architectures.layout import parameters
from koala.architectures.table import get
from koala.data.sampler import WINDOW, BatchOrder
from koala.recipes.gpus import GPUS, SHARE

CARD = "h100"
PER_NODE = 8  # GPUs
# GB/s at which a ring over all GPUs sends its bytes, by the network between nodes: inside a node
# NVLink (an H100's 450 one way), between nodes eight cards of 400 Gbit/s, or one of 100.
NVLINK, FAST, SLOW = 450.0, 8 * 400 / 8, 100 / 8
SAMPLE = 2 * 2 * 4 * 128 * 128  # bytes: mean and deviation in bf16, 4 x 128 x 128
SHARD_ROWS = 4096 // 41  # a unit of the preparation over SDXL's buckets
HEAD = (
    "GPUs", "batch", "samples a GPU", "compute", "gradients sent a GPU", "over 8 x 400 Gbit/s",
    "over 1 x 100 Gbit/s", "samples/s", "data read", "processes a shard", "shards, if read whole",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step on `gpus` GPUs; times in seconds, bytes of one GPU."""

    gpus: int
    batch: int
    computing: float
    sent: float
    fast: float
    slow: float

    def samples_per_second(self, sending: float) -> float:
        """Where gradients are sent while the backward pass, two thirds of the step, computes."""
        return self.batch / (self.computing + max(0.0, sending - self.computing * 2 / 3))


def step(gpus: int) -> Step:
    """A step of the recipe's batch, or of one sample a GPU where that is more."""
    recipe = recipes.get("koala-lightning-700m")
    student, teacher = (get(name) for name in (recipe.cut, recipe.of))
    side = recipe.pixels
    flops = 3 * forward_flops(student, side, side, student.tokens)
    flops += forward_flops(teacher, side, side, teacher.tokens)
    batch = max(recipe.training.batch, gpus)
    # A ring all-reduce sends and receives every byte twice, but for a GPU's own part.
    sent = 2 * (gpus - 1) / gpus * 4 * parameters(student)
    fast, slow = (FAST, SLOW) if gpus > PER_NODE else (NVLINK, NVLINK)
    computing = batch / gpus * flops / (SHARE * GPUS[CARD].tflops * 1e12)
    return Step(gpus, batch, computing, sent, sent / fast / 1e9, sent / slow / 1e9)


def sharing(gpus: int, batch: int) -> float:
    """How many of the processes meet a shard, on the average: a window of shards is shared out."""
    order = BatchOrder(
        np.arange(WINDOW), np.full(WINDOW, SHARD_ROWS), np.zeros(WINDOW, int), seed=0
    )
    met: list[set[int]] = [set() for _ in range(gpus)]
    for number in range(WINDOW * SHARD_ROWS // batch):
        places = order.batch(number, batch)
        for rank in range(gpus):
            own = places[rank * batch // gpus : (rank + 1) * batch // gpus]
            met[rank].update(shard for shard, _ in own)
    return sum(map(len, met)) / WINDOW


def table() -> str:
    """The steps as a Markdown table."""
    lines = [HEAD, ("---:",) * len(HEAD)]
    for s in map(step, (8, 64, 512)):
        rate, met = s.samples_per_second(s.fast), sharing(s.gpus, s.batch)
        lines.append(
            (
                f"{s.gpus}",
                f"{s.batch}",
                f"{s.batch // s.gpus}",
                f"{1000 * s.computing:.0f} ms",
                f"{s.sent / 1e9:.2f} GB",
                f"{1000 * s.fast:.0f} ms",
                f"{1000 * s.slow:.0f} ms" if s.gpus > PER_NODE else "-",
                f"{rate:,.0f}; {s.samples_per_second(s.slow):,.0f}" if s.gpus > PER_NODE
                else f"{rate:,.0f}",
                f"{rate * SAMPLE / 2**20:,.0f} MiB/s",
                f"{met:.1f}",
                f"{rate / SHARD_ROWS * met:,.0f}/s",
            )
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
