"""The settings of a training: what is done (`Training`), how it is distributed (`Hardware`), and
the loss of a distillation (`DistillationSettings`, `StepSettings`).

`Training` determines the result and is fixed for a run. `Hardware` changes it by rounding alone, so
a run may be resumed with other processes, another division of the batch, or another compiler.
Importing this module is cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from koala.architectures.block_map import check_depth_rule
from koala.checkpoints.sampling import USUAL, Sampling
from koala.errors import UserError, unknown

OPTIMIZERS = ("adamw", "adamw-8bit")
SHARDINGS = ("ddp", "fsdp")
TEACHERS = ("whole", "sharded", "offloaded")
LOCATIONS = ("sa", "ca", "ffn", "residual", "lf")  # of features
METHODS = ("progressive", "mmd", "dmd")  # of step distillation
MOST_SUBSTEPS = 50  # of a teacher for one step of its student
MOST_STEPS = 10  # of a student of step distillation: KOALA's usual number
STAGES = ("DW-1", "DW-2", "DW-3", "Mid", "UP-1", "UP-2", "UP-3")


@dataclass(frozen=True)
class Training:
    """Length, optimiser and records of a training. Everything is counted in samples."""

    samples: int  # seen in the whole run
    batch: int  # of one step, over all processes
    lr: float  # constant after the warm-up, or decaying to 0 if `decay`
    warmup: int = 0  # samples
    decay: bool = False  # linearly to zero over the whole run
    optimizer: str = "adamw"  # fused; "adamw-8bit" keeps its moments in 8 bits (torchao)
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW's
    weight_decay: float = 0.01  # AdamW's
    clip: float = 1.0  # maximum norm of the gradient
    ema_half_life: int = 10_000  # samples; of the average used for previews and exported
    ema_others: tuple[int, ...] = ()  # further half-lives, exported too
    seed: int = 0  # of the order of samples, noise, timesteps, dropped captions
    log_every: int = 1_024  # samples
    validate_every: int = 0  # samples; 0: never
    preview_every: int = 20_000  # samples
    save_every: float = 45.0  # seconds
    keep: int = 2  # newest checkpoints
    keep_every: int = 0  # samples; checkpoints at multiples are kept for good; 0: none
    critic_lr: float = 0.0  # of the second network that some tasks train; it follows lr's course
    critic_updates: int = 0  # steps of that network before each one of the student's

    def __post_init__(self) -> None:
        above_0 = ("samples", "batch", "lr", "clip", "log_every", "preview_every", "keep")
        others = ("warmup", "weight_decay", "seed", "validate_every", "save_every", "keep_every",
                  "critic_lr", "critic_updates")  # fmt: skip
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
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}: both must be at least 0 and below 1")
        if bool(self.critic_lr) != bool(self.critic_updates):
            raise UserError(
                f"critic_lr is {self.critic_lr} and critic_updates {self.critic_updates}: give "
                "both a value above 0, or neither"
            )
        if self.samples % self.batch:
            raise UserError(
                f"{self.samples} samples are not a multiple of the batch {self.batch}: "
                f"use {math.ceil(self.samples / self.batch) * self.batch}"
            )

    @property
    def half_lives(self) -> tuple[int, ...]:
        """The half-life of every EMA, that of the exported one first."""
        return (self.ema_half_life, *self.ema_others)

    def moves_critic(self, seen: int) -> bool:
        """Whether the step that starts after `seen` samples trains the critic, not the student."""
        cycle = self.critic_updates + 1
        return seen // self.batch % cycle < self.critic_updates

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
    reduce_last: bool = False  # fsdp: exchange gradients after the last part alone; they are whole
    teacher: str = "whole"  # or "sharded" over processes, or "offloaded" to main memory, by block
    checkpointing: bool = False  # recompute the blocks' activations in the backward pass
    compile: str = ""  # torch.compile backend for each block, e.g. "inductor"; "": eager
    channels_last: bool = True  # memory format of images and convolutions
    ema_on_cpu: bool = False  # averages in main memory, 4 bytes per parameter each
    cpu_bf16: bool = False  # bf16 on a CPU that supports it, as always on a GPU that does
    fp16: bool = False  # fp16 and a scaled loss on a GPU that has bf16, as always on one without
    stored_text: bool = False  # the data must hold text embeddings, so that no encoder is needed

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UserError(f"accumulate is {self.accumulate}: it must be 1 or more")
        for name, allowed in (("sharding", SHARDINGS), ("teacher", TEACHERS)):
            value = getattr(self, name)
            if value not in allowed:
                raise unknown(name, value, allowed)
        if self.reduce_last and (self.sharding != "fsdp" or self.accumulate == 1):
            raise UserError(
                "reduce_last=true has no effect without sharding=fsdp and accumulate above 1: "
                "leave it out"
            )

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


# --- what a student learns from its teacher -------------------------------------------------


@dataclass(frozen=True)
class Tap:
    """A kind of feature to compare.

    location: "sa", "ca", "ffn": output of self-attention, cross-attention, feed-forward net of
      each transformer block, [n, tokens, width], before it is added to the residual stream.
      "residual": output of each resnet, [n, c, h, w].
      "lf": last feature, the hidden state that a stage passes to the next, [n, c, h, w]:
      after the down- or upsampler if the stage has one.
    stages: names from `STAGES`; None: every stage with such a feature.
    """

    location: str
    stages: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.location not in LOCATIONS:
            raise unknown("tap location", self.location, LOCATIONS)
        if self.stages is None:
            return
        if isinstance(self.stages, str) or not self.stages:
            raise UserError(
                f"tap stages {self.stages!r}: give a tuple of names from {', '.join(STAGES)}"
            )
        for stage in self.stages:
            if stage not in STAGES:
                raise unknown("tap stage", stage, STAGES)


# The paper's best recipe: 30 SA + 2 LF taps in KOALA-1B, 21 + 2 in KOALA-700M.
PAPER_TAPS = (Tap("sa"), Tap("lf", ("DW-1", "UP-3")))


def check_dropout(caption_dropout: float) -> None:
    """UserError unless it is a share of the samples."""
    if not 0.0 <= caption_dropout <= 1.0:
        raise UserError(f"caption dropout {caption_dropout}: it must be between 0 and 1")


def check_min_snr(gamma: float | None) -> None:
    """UserError unless gamma is above 0, or None."""
    if gamma is not None and not (math.isfinite(gamma) and gamma > 0):
        raise UserError(f"min_snr {gamma}: it must be above 0 (5 is usual), or None")


def check_scale(guidance: float | None) -> None:
    """UserError unless a guidance scale is above 1, or None."""
    if guidance is not None and not (math.isfinite(guidance) and guidance > 1):
        raise UserError(f"guidance {guidance}: it must be above 1, or None for none")


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"steps {steps}: a student draws in 1 to {MOST_STEPS}")


@dataclass(frozen=True)
class DistillationSettings:
    """Settings of the loss. A term with weight 0 is not computed.

    The paper states no weights; 1/1/1 is our reading. It weights all timesteps equally.

    Guidance makes output and features of the teacher those of classifier-free guidance, so that the
    student draws without guidance what its teacher draws with it, in half the passes (Meng et al.,
    arXiv 2210.03142; here one scale). It is not for step-distilled teachers, which draw without.

    UserError for values that cannot be, and for a setting without effect.
    """

    task_weight: float = 1.0  # of L_task: finite, 0 or more
    output_weight: float = 1.0  # of L_outKD
    feature_weight: float = 1.0  # of L_featKD
    min_snr: float | None = None  # gamma of L_task's min-SNR weights; none: timesteps are equal
    min_snr_out: bool = False  # these weigh L_outKD as well
    guidance: float | None = None  # the teacher's scale, above 1; none: its plain prediction
    steps: int = 10  # with guidance: what its student is drawn in by default, 1 to 10
    taps: tuple[Tap, ...] = PAPER_TAPS  # features compared, as sa+lf@DW-1,UP-3; none with weight 0
    depth_rule: str = "bottom"  # pairs transformer blocks: "bottom" (the paper's best),
    # "interleave" or "up"
    normalise: bool = False  # divide a tap's error of a sample by the mean square of the teacher's
    # feature (LAPTOP-Diff, 2404.11098), so that no tap outweighs the others by its scale
    caption_dropout: float = 0.1  # share of samples without a caption, for guidance

    def __post_init__(self) -> None:
        weights = {
            "task_weight": self.task_weight,
            "output_weight": self.output_weight,
            "feature_weight": self.feature_weight,
        }
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"{name} {weight}: it must be a finite number, 0 or more")
        if not any(weights.values()):
            raise UserError("all loss weights are 0: give at least one a value above 0")
        check_min_snr(self.min_snr)
        if self.min_snr_out and (self.min_snr is None or self.output_weight == 0):
            raise UserError("min_snr_out has no effect without min_snr and output_weight")
        if self.min_snr is not None and self.task_weight == 0 and not self.min_snr_out:
            raise UserError(
                f"min_snr {self.min_snr} is given but task_weight is 0, so it has no effect: "
                "leave it out, give task_weight a value above 0, or set min_snr_out"
            )
        check_depth_rule(self.depth_rule)
        check_dropout(self.caption_dropout)
        self._check_guidance()
        self._check_features()

    def _check_features(self) -> None:
        if self.feature_weight > 0:
            if not self.taps:
                raise UserError(
                    f"feature_weight {self.feature_weight} without taps: give taps, or weight 0"
                )
            return
        given = {
            "taps": bool(self.taps),
            "normalise": self.normalise,
            "depth_rule": self.depth_rule != "bottom",
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise UserError(
                f"{name} is given but feature_weight is 0, so it has no effect: "
                "leave it out, or give feature_weight a value above 0"
            )

    def _check_guidance(self) -> None:
        check_scale(self.guidance)
        _check_steps(self.steps)
        if self.guidance is None:
            if self.steps != USUAL.steps:
                raise UserError(
                    f"steps {self.steps} without guidance has no effect: give the teacher's "
                    "guidance too, or leave it out"
                )
            return
        if not self.learns_from_teacher:
            raise UserError("guidance is the teacher's, but no loss term compares with it")
        if self.caption_dropout > 0:
            raise UserError(
                f"caption_dropout {self.caption_dropout} with guidance: the student of a guided "
                "teacher draws without guidance and needs no dropped captions; set it to 0"
            )

    @property
    def sampling(self) -> Sampling | None:
        """What the student is drawn with, if not as its teacher."""
        return Sampling(steps=self.steps, guidance=1.0) if self.guidance else None

    @property
    def learns_from_teacher(self) -> bool:
        """Whether any term uses the teacher."""
        return self.output_weight > 0 or self.feature_weight > 0


@dataclass(frozen=True)
class StepSettings:
    """Settings of a step distillation, `koala.distillation.few_steps`.

    method: "progressive" teaches a step to lead where several of the teacher's lead (Salimans and
      Ho, arXiv 2202.00512); "mmd" compares the means of the teacher's features (SwD, 2503.16397);
      "dmd" compares scores, the student's told by a second U-Net that is trained beside it (DMD2,
      2405.14867; along the student's trajectory as TDM does, 2503.06674).
    guidance: classifier-free, above 1; None: none.
    UserError for anything else, and for a setting without effect.
    """

    method: str  # "progressive": steps; "mmd": the teacher's features; "dmd": scores, with a critic
    steps: int = 4  # that the student draws in, 1 to 10
    guidance: float | None = None  # the teacher's scale; not of "mmd"
    substeps: int | None = None  # of the teacher for each of the student's; "progressive" alone
    taps: tuple[Tap, ...] = ()  # features that are compared; "mmd" alone

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        _check_steps(self.steps)
        check_scale(self.guidance)
        if self.method == "mmd" and self.guidance is not None:
            raise UserError(
                f"guidance {self.guidance:g} has no effect on method mmd, which compares with "
                "images: leave it out (settings.guidance=none)"
            )
        self._check_given("taps", bool(self.taps), "mmd", "the features that it compares", "")
        per_step = f"the teacher's steps for each of its own, 1 to {MOST_SUBSTEPS}"
        self._check_given("substeps", self.substeps is not None, "progressive", per_step, "none")
        if self.substeps is not None and not 1 <= self.substeps <= MOST_SUBSTEPS:
            raise UserError(f"substeps {self.substeps}: give 1 to {MOST_SUBSTEPS}")

    def _check_given(self, name: str, given: bool, method: str, what: str, empty: str) -> None:
        """UserError unless `name` is given to the one method that needs it, and to no other."""
        if self.method == method and not given:
            raise UserError(f"method {method} needs {name}, {what}")
        if self.method != method and given:
            raise UserError(
                f"{name} have no effect on method {self.method}: leave them out "
                f"(settings.{name}={empty})"
            )

    @property
    def trains_critic(self) -> bool:
        """Whether a second network is trained beside the student."""
        return self.method == "dmd"

    @property
    def sampling(self) -> Sampling:
        """What the student is drawn with."""
        return Sampling(steps=self.steps, guidance=1.0)

    @property
    def learns_from_teacher(self) -> bool:
        """Always."""
        return True
