"""Estimates the memory of a training by part, before it starts.

Persistent parts (weights, optimiser, averages, teacher) are counted. The memory of a step is found
by running one: the real task runs forward and backward on the meta device, where tensors have
shapes but no data (`koala.generation.memory.peak`), and the tensors alive at the peak are added up.
So taps, checkpointing and gradient accumulation are exact at any size.

Not included: library workspaces and the device's context (estimated by `OVERHEAD`), fragmentation
of the allocator, and previews, which are drawn after a step's activations are freed. Compiled
blocks need less than is counted here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from koala.architectures.config import unet_config
from koala.architectures.layout import parameters
from koala.architectures.table import FACTOR, LATENT_CHANNELS, UNetArchitecture
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.load import load_scheduler_config
from koala.distillation.few_steps import DistributionMatching
from koala.distillation.forward_process import NoiseSchedule, generators_at
from koala.distillation.optimizers import trained_parameters
from koala.distillation.parallel import World, lay_out
from koala.distillation.settings import DistillationSettings, Hardware, StepSettings, Training
from koala.distillation.taps import regions
from koala.distillation.tasks import Denoising
from koala.generation.memory.peak import Alive, FusedAttention
from koala.lora.training import LoraSettings, add_lora
from koala.recipes.tasks import student_task

OVERHEAD = 2**30  # bytes of a GPU: context, cuDNN's and cuBLAS's workspaces; assumed
STATES_8BIT = (4096, 256)  # torchao: smallest tensor kept in 8 bits, values per scale
AHEAD = 2  # regions gathered by FSDP2 at once: one running, one prefetched
META = torch.device("meta")


@dataclass(frozen=True)
class TrainingSetup:
    """The facts that determine a training's memory; image sizes in pixels."""

    student: UNetArchitecture
    teacher: UNetArchitecture | None  # None: L_task alone, no teacher
    settings: DistillationSettings | StepSettings | None  # None: a `Denoising`
    training: Training
    hardware: Hardware
    world: int  # processes, a device each
    pixels: int
    on_gpu: bool  # bf16 autocast, and what is frozen in bf16; else float32
    lora: LoraSettings | None = None  # what alone is trained

    @property
    def micro_batch(self) -> int:
        """Samples computed at once; UserError if the batch does not divide evenly."""
        return self.hardware.micro_batch(self.training.batch, self.world)


def device_memory(setup: TrainingSetup) -> dict[str, int]:
    """Bytes on each device at the peak of a step, by part; without text encoders and VAE.

    With DDP or accumulation all gradients exist from the start. Otherwise they are allocated while
    activations are freed, and those alive at the peak are counted. Of a student's and a critic's
    turn the one that takes more is counted.
    """
    student = blank_student(setup)
    shares = setup.world if setup.hardware.sharding == "fsdp" else 1
    numbers = [p.numel() for p in trained_parameters(student).values()]
    frozen = sum(p.nbytes for p in student.parameters() if not p.requires_grad)
    in_bf16 = setup.on_gpu or setup.hardware.cpu_bf16
    width = 2 if in_bf16 else 4
    gathered = width * _gathered(student, AHEAD) if shares > 1 else 0
    lengths = 0 if setup.hardware.ema_on_cpu else len(setup.training.half_lives)
    turns = (False, True) if setup.training.critic_updates else (False,)
    step = max((_step(setup, of_critic) for of_critic in turns), key=lambda p: sum(p.values()))
    whole = step["gradients"] if setup.hardware.reduce_last else gathered  # beside the shares
    if shares > 1 and in_bf16:
        step["copies"] = 0  # what is gathered is in bf16 already
    parts = {
        "weights": 4 * sum(numbers) // shares + gathered,
        "gradients": step["gradients"] // shares + whole,
        "optimiser": optimiser_bytes(numbers, setup.training.optimizer) // shares,
        "averages": 4 * lengths * sum(numbers) // shares,
        "critic and its optimiser": _critic_bytes(setup) // shares,
        "teacher": _teacher_bytes(setup),
        "frozen weights": frozen,
        "bf16 copies of weights": step["copies"],
        "activations": step["activations"],
        "context and workspaces": OVERHEAD if setup.on_gpu else 0,
    }
    return {part: size for part, size in parts.items() if size or part == "gradients"}


def main_memory(setup: TrainingSetup) -> dict[str, int]:
    """Bytes of main memory in the first process, by part; only it writes checkpoints."""
    numbers = [p.numel() for p in trained_parameters(blank_student(setup)).values()]
    weights, lengths = 4 * sum(numbers), len(setup.training.half_lives)
    moments = optimiser_bytes(numbers, setup.training.optimizer)
    parts = {
        "averages": lengths * weights if setup.hardware.ema_on_cpu else 0,
        "a checkpoint while it is written": (1 + lengths) * weights
        + moments
        + _critic_bytes(setup),
    }
    if setup.teacher is not None and setup.hardware.teacher == "offloaded":
        parts["teacher"] = 2 * parameters(setup.teacher)
    return {part: size for part, size in parts.items() if size}


def optimiser_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """Bytes of AdamW's two moments for tensors of these sizes."""
    total = 0
    least, block = STATES_8BIT
    for n in sizes:
        in_8_bits = optimizer == "adamw-8bit" and n >= least and n % block == 0
        total += 2 * (n + 4 * n // block if in_8_bits else 4 * n)
    return total


def blank_unet(arch: UNetArchitecture) -> UNet2DConditionModel:
    """The U-Net on the meta device, fp32."""
    with META:
        return UNet2DConditionModel(**unet_config(arch))


def blank_student(setup: TrainingSetup) -> UNet2DConditionModel:
    """The U-Net that is trained, with its LoRA, on the meta device."""
    unet = blank_unet(setup.student)
    if setup.lora:
        if setup.on_gpu:
            nn.Module.to(unet, torch.bfloat16)
        with META:
            add_lora(unet, setup.lora)
    return unet


def _gathered(unet: nn.Module, regions_at_once: int) -> int:
    """Parameters gathered at once; those outside the regions always are."""
    inside = [sum(p.numel() for p in region.block.parameters()) for region in regions(unet)]
    every = sum(p.numel() for p in unet.parameters())
    return every - sum(inside) + regions_at_once * max(inside)


def _critic_bytes(setup: TrainingSetup) -> int:
    """Of the second trained network, a copy of the teacher, and its moments; 0 without one."""
    if setup.teacher is None or not setup.training.critic_updates:
        return 0
    numbers = [p.numel() for p in blank_unet(setup.teacher).parameters()]
    return 4 * sum(numbers) + optimiser_bytes(numbers, setup.training.optimizer)


def _teacher_bytes(setup: TrainingSetup) -> int:
    if setup.teacher is None:
        return 0
    width = 2 if setup.on_gpu else 4
    whole = width * parameters(setup.teacher)
    if setup.hardware.teacher == "whole":
        return whole
    sharded = setup.hardware.teacher == "sharded"
    held = width * _gathered(blank_unet(setup.teacher), AHEAD if sharded else 1)
    return held + (whole // setup.world if sharded else 0)


# --- a step without numbers -----------------------------------------------------------------


def _step(setup: TrainingSetup, of_critic: bool) -> dict[str, int]:
    """Bytes held by a step at its peak: gradients, copies, activations. of_critic: whose turn."""
    student = blank_student(setup)
    teacher = None if setup.teacher is None else blank_unet(setup.teacher)
    task = task_of(setup, student, teacher)
    trained, compute = [student], task.losses
    if isinstance(task, DistributionMatching):
        trained.append(task.critic)
        compute = task.critic_losses if of_critic else compute
    moving = trained[-1] if of_critic else student
    if teacher is not None and setup.on_gpu:
        nn.Module.to(teacher, torch.bfloat16)
    batch, ledger = batch_of(setup, META), _Ledger()
    autocast = _Autocast(ledger)
    in_bf16 = setup.on_gpu or setup.hardware.cpu_bf16
    modes = [FusedAttention(), *([autocast] if in_bf16 else [])]
    recomputed = [*trained, teacher] if teacher is not None and task.through_teacher else trained
    for region in (region for network in recomputed for region in regions(network)):
        # Applied to the recomputation in the backward pass too.
        region.compute = partial(_within, modes, region.compute)
    alone = replace(setup.hardware, compile="", sharding="ddp", teacher="whole", fp16=False)
    lay_out(task, alone, World(device=META))
    replicated = setup.world > 1 and setup.hardware.sharding == "ddp"  # in buckets, for good
    kept = trained if replicated else [moving]
    kept = kept if setup.world > 1 or setup.hardware.accumulate > 1 else []
    for parameter in (p for network in kept for p in trained_parameters(network).values()):
        parameter.grad = torch.empty_like(parameter)
    with ledger:
        draws = generators_at(0, 0, setup.micro_batch)
        loss = _within(modes, compute, batch, draws)["loss"]
        autocast.forget()
        loss.backward()
        for parameter in trained_parameters(moving).values():
            ledger.name(cast(Tensor, parameter.grad), "gradients")
    found = {"gradients": 0, "copies": 0, "activations": 0} | ledger.fullest()
    if kept:
        each = (p for network in kept for p in trained_parameters(network).values())
        found["gradients"] = 4 * sum(p.numel() for p in each)
    return found


def _within(
    modes: Sequence[TorchFunctionMode], compute: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The result of `compute` under the modes."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        return compute(*args, **kwargs)


def task_of(
    setup: TrainingSetup, student: UNet2DConditionModel, teacher: UNet2DConditionModel | None
) -> Denoising:
    """The setup's task for models without weights; batches must hold text embeddings.

    It can neither draw previews nor export.
    """
    base = BUNDLED / "koala-mini"  # any pipeline folder: used by export alone
    no_text: Any = None
    config = load_scheduler_config(base)
    if teacher is None:
        return Denoising(student, no_text, NoiseSchedule(config), base)
    assert setup.settings is not None
    return student_task(setup.settings, student, teacher, no_text, config, base)


def batch_of(setup: TrainingSetup, device: torch.device) -> dict[str, Any]:
    """A micro-batch of zeros with text embeddings."""
    n, side, arch = setup.micro_batch, setup.pixels // FACTOR, setup.student
    return {
        "latents": torch.zeros(n, LATENT_CHANNELS, side, side, device=device),
        "captions": [""] * n,
        "text": torch.zeros(n, arch.tokens, arch.context, device=device),
        "pooled": torch.zeros(n, arch.pooled, device=device),
        "time_ids": torch.zeros(n, 6, device=device),
    }


class _Ledger(Alive):
    """Records all storages, to find out what was alive at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[int] = []  # by storage number, in order of creation
        self._events: list[int] = []  # a storage number: created; its complement: freed
        self._numbers = WeakIdKeyDictionary()
        self._names: dict[int, str] = {}

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            super()._add(storage)
            number = len(self._sizes)
            self._sizes.append(storage.nbytes())
            self._numbers[storage] = number
            self._events.append(number)
            weakref.finalize(storage, self._events.append, ~number)

    def name(self, tensor: Tensor, name: str) -> None:
        """Names a tensor's part; unnamed tensors are activations."""
        number = self._numbers.get(tensor.untyped_storage())
        if number is not None:
            self._names[number] = name

    def fullest(self) -> dict[str, int]:
        """Bytes by part at the peak."""
        changes = (self._sizes[e] if e >= 0 else -self._sizes[~e] for e in self._events)
        held = list(accumulate(changes))
        peak = max(range(len(held)), key=held.__getitem__)
        alive: dict[str, int] = {}
        for event in self._events[: peak + 1]:
            number = event if event >= 0 else ~event
            name = self._names.get(number, "activations")
            sign = 1 if event >= 0 else -1
            alive[name] = alive.get(name, 0) + sign * self._sizes[number]
        return alive


class _Autocast(TorchFunctionMode):
    """CUDA's bf16 autocast for a U-Net's operations, on the meta device."""

    _IN_BF16 = ("linear", "conv2d", "scaled_dot_product_attention")
    _IN_FP32 = ("group_norm", "layer_norm")

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._copies: dict[Tensor, Tensor] | None = {}  # of weights, until the forward pass ends

    def forget(self) -> None:
        """The forward pass has ended: drops copies, unless a gradient needs them."""
        self._copies = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._IN_BF16:
            args, kwargs = tree_map(self._lowered, (args, kwargs))
        elif name in self._IN_FP32:
            args, kwargs = tree_map(_raised, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _lowered(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dtype == torch.float32):
            return value
        if not isinstance(value, nn.Parameter):
            return value.bfloat16()
        # Those of passes without gradient serve no other pass (`few_steps.without_gradient`).
        kept = self._copies is not None and torch.is_grad_enabled()
        copies = self._copies if kept and self._copies is not None else {}
        if value not in copies:
            copies[value] = value.bfloat16()
            self._ledger.name(copies[value], "copies")
        return copies[value]


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
