"""The settings of a training: what is done (`Training`) and how it is distributed (`Hardware`).

`Training` determines the result and is fixed for a run. `Hardware` changes it by rounding alone, so
a run may be resumed with other processes, another division of the batch, or another compiler.
Importing this module is cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from koala.errors import UserError

OPTIMIZERS = ("adamw", "adamw-8bit")
SHARDINGS = ("ddp", "fsdp")
TEACHERS = ("whole", "sharded", "offloaded")


@dataclass(frozen=True)
class Training:
    """Length, optimiser and records of a training. Everything is counted in samples."""

    samples: int
    batch: int  # of one step, over all processes
    lr: float  # constant after the warm-up, or decaying to 0 if `decay`
    warmup: int = 0  # samples
    decay: bool = False  # linearly to zero over the whole run
    optimizer: str = "adamw"  # fused; "adamw-8bit" keeps its moments in 8 bits (torchao)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0  # maximum norm of the gradient
    ema_half_life: int = 10_000  # samples; of the average used for previews and exported
    ema_others: tuple[int, ...] = ()  # further half-lives, exported too
    seed: int = 0
    log_every: int = 1_024  # samples
    validate_every: int = 0  # samples; 0: never
    preview_every: int = 20_000  # samples
    save_every: float = 45.0  # seconds
    keep: int = 2  # newest checkpoints
    keep_every: int = 0  # samples; checkpoints at multiples are kept for good; 0: none

    def __post_init__(self) -> None:
        above_0 = ("samples", "batch", "lr", "clip", "log_every", "preview_every", "keep")
        others = ("warmup", "weight_decay", "seed", "validate_every", "save_every", "keep_every")
        for name in (*above_0, *others):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0 and (value > 0 or name not in above_0)):
                bound = "above 0" if name in above_0 else "0 or more"
                raise UserError(f"{name} is {value}: it must be {bound}")
        lengths = (self.ema_half_life, *self.ema_others)
        if not all(math.isfinite(length) and length > 0 for length in lengths):
            raise UserError(f"EMA half-lives are {lengths}: each must be above 0")
        if len(set(lengths)) != len(lengths):
            raise UserError(f"EMA half-lives are {lengths}: name each once")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer {self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}: both must be at least 0 and below 1")
        if self.samples % self.batch:
            raise UserError(
                f"{self.samples} samples are not a multiple of the batch {self.batch}: "
                f"use {math.ceil(self.samples / self.batch) * self.batch}"
            )

    @property
    def half_lives(self) -> tuple[int, ...]:
        """The half-life of every EMA, that of the exported one first."""
        return (self.ema_half_life, *self.ema_others)

    def lr_at(self, seen: int) -> float:
        """Learning rate of the step that starts after `seen` samples."""
        warm = min(1.0, (seen + self.batch) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * ((1 - seen / self.samples) if self.decay else 1.0)


@dataclass(frozen=True)
class Hardware:
    """How processes and devices share a training; this changes the result by rounding alone.

    torchrun starts several processes; `sharding` and a "sharded" teacher need them.
    """

    accumulate: int = 1  # gradient accumulation: parts of a process's share of the batch
    sharding: str = "ddp"  # of student and optimiser: "ddp" replicates, "fsdp" shards
    teacher: str = "whole"  # or "sharded" over processes, or "offloaded" to main memory, by block
    checkpointing: bool = False  # recompute the blocks' activations in the backward pass
    compile: str = ""  # torch.compile backend for each block, e.g. "inductor"; "": eager
    channels_last: bool = True
    ema_on_cpu: bool = False  # averages in main memory, 4 bytes per parameter each
    cpu_bf16: bool = False  # bf16 on a CPU that supports it, as always on a GPU

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UserError(f"accumulate is {self.accumulate}: it must be 1 or more")
        for name, allowed in (("sharding", SHARDINGS), ("teacher", TEACHERS)):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"{name} {value!r}: choose from {', '.join(allowed)}")

    def micro_batch(self, batch: int, processes: int) -> int:
        """Samples computed at once; UserError if the batch does not divide evenly."""
        parts = processes * self.accumulate
        if batch % parts:
            raise UserError(
                f"a batch of {batch} does not divide into {parts} equal parts ({processes} "
                f"processes x accumulate {self.accumulate}): change accumulate or the processes"
            )
        return batch // parts


PLAIN = Hardware()  # one device, eager, everything on it
