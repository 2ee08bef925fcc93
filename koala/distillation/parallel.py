"""Processes and devices of a training, and the distribution of models over them.

All of it is applied to a model from outside, in the order of `lay_out`. Tasks and models know
nothing of it; the loop uses a `Layout`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from koala.distillation.settings import PLAIN, Hardware
from koala.distillation.taps import Region, regions
from koala.errors import FailedElsewhere, Failure, UserError
from koala.utils.device import compute_dtype, cpu_name, has_bf16, pick_device


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen by one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean of fp32 CPU values over the processes; the same in all of them."""
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def failure(self, message: str) -> Failure:
        """The exception for a failure of all processes; only the first one prints the message."""
        return Failure(message) if self.first else FailedElsewhere(message)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Makes a failure of one process fail all; the lowest failed rank prints the reason."""
        mine: Exception | None = None
        try:
            yield
        except FailedElsewhere:  # all know already
            raise
        except (UserError, Failure, OSError) as error:
            mine = error
        if self.size > 1:
            failed = torch.tensor(self.size if mine is None else self.rank)
            distributed.all_reduce(failed, distributed.ReduceOp.MIN)
            if failed < self.size and failed != self.rank:
                raise FailedElsewhere(f"process {failed} failed") from mine
        if mine is not None:
            raise mine

    def check_shared(self, path: Path) -> None:
        """UserError in every process unless all see this file or folder of the first one's."""
        with self.together():
            if not path.exists():
                raise UserError(
                    f"{path.parent}: process {self.rank} does not see what process 0 wrote there: "
                    "all machines must share the folder --out"
                )


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """Joins the processes started by torchrun, each on its own device; else a single process.

    device: "cpu" or "cuda"; None picks the best one. UserError if the machine has fewer GPUs than
    processes, or one GPU is given for several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    picked = pick_device(device)
    if size == 1:
        yield World(device=picked)
        return
    rank, here = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if picked.type == "cuda":
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if picked.index is not None or wanted > there:
            raise UserError(
                f"{wanted} processes on this machine need one GPU each, but {device or 'cuda'} has "
                f"{there if picked.index is None else 1}: start one process per GPU, with "
                "--device cuda or without --device"
            )
        picked = torch.device("cuda", here)
        torch.cuda.set_device(picked)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo")
    yield World(rank, size, picked)
    distributed.destroy_process_group()  # not after an error: others may still be waiting


class Laid(Protocol):
    """The interface of a task for `lay_out`; see `koala.distillation.tasks`."""

    @property
    def trainable(self) -> nn.Module: ...
    @property
    def teacher(self) -> UNet2DConditionModel | None: ...
    @property
    def through_teacher(self) -> bool: ...
    def call_through(self, wrapped: nn.Module) -> None: ...


@runtime_checkable
class LaidWithCritic(Laid, Protocol):
    """A task with a second trainable network; see `koala.distillation.few_steps`."""

    @property
    def critic(self) -> UNet2DConditionModel: ...
    def call_critic_through(self, wrapped: nn.Module) -> None: ...


@dataclass(frozen=True)
class Layout:
    """The distribution of a training; by default this process and the model's device."""

    world: World = World()
    hardware: Hardware = PLAIN
    dtype: torch.dtype = torch.float32  # of products; weights are float32
    replicas: tuple[DistributedDataParallel, ...] = ()
    shards: tuple[FSDPModule, ...] = ()

    def computing(self, last: bool) -> AbstractContextManager:
        """Context of each part of a step; replicas exchange gradients only in the `last`.

        Shards do so in each part, unless `Hardware.reduce_last`.
        """
        for network in self.shards if self.hardware.reduce_last else ():
            network.set_requires_gradient_sync(last)
        contexts = contextlib.ExitStack()
        for replica in () if last else self.replicas:
            contexts.enter_context(replica.no_sync())
        return contexts


def lay_out(task: Laid, hardware: Hardware, world: World, buckets: int = 1) -> Layout:
    """Distributes a task's models over processes and devices. UserError for invalid settings.

    buckets: sizes of images that there are; with several, compiled code is for all of them.

    The order matters:
    1. taps are attached to the raw modules when the task is created;
    2. precision of the teacher, and memory format;
    3. compiling of each region, with its features as outputs;
    4. checkpointing around the compiled regions;
    5. FSDP2 or DDP around everything.
    """
    with world.together():
        _check(task, hardware, world)
    student, teacher = task.trainable, task.teacher
    critic = task.critic if isinstance(task, LaidWithCritic) else None
    trained = [student] if critic is None else [student, critic]
    networks = trained if teacher is None else [*trained, teacher]
    if hardware.fp16 and teacher is not None:
        nn.Module.to(teacher, torch.float16)
    if hardware.channels_last:
        for network in trained:
            _to_channels_last(network, sharded=hardware.sharding == "fsdp")
        if teacher is not None:
            _to_channels_last(teacher, sharded=hardware.teacher == "sharded")
    if hardware.compile:
        found = [region for network in networks for region in regions(network)]
        _compile(found, hardware.compile, dynamic=buckets > 1)
    if hardware.checkpointing:
        for network in networks if task.through_teacher else trained:
            _checkpoint(regions(network))
    if teacher is not None and hardware.teacher == "offloaded":
        for region in regions(teacher):
            _offload(region.block, world.device)
    if teacher is not None and hardware.teacher == "sharded":
        _shard(teacher, world, _AS_IT_IS)
    dtype = _dtype(hardware, world)
    if hardware.sharding == "fsdp":
        shards = tuple(_shard(network, world, _computing_in(dtype)) for network in trained)
        return Layout(world, hardware, dtype, shards=shards)
    if world.size > 1:
        replicas = tuple(_replicated(network, world) for network in trained)
        task.call_through(replicas[0])
        if isinstance(task, LaidWithCritic):
            task.call_critic_through(replicas[1])
        return Layout(world, hardware, dtype, replicas)
    return Layout(world, hardware, dtype)


def _dtype(hardware: Hardware, world: World) -> torch.dtype:
    if hardware.fp16:
        return torch.float16
    return torch.bfloat16 if hardware.cpu_bf16 else compute_dtype(world.device)


def _replicated(network: nn.Module, world: World) -> DistributedDataParallel:
    return DistributedDataParallel(
        network,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def alone(device: str, cpu_bf16: bool) -> Layout:
    """The layout of a training in one process, with `Hardware.cpu_bf16` as its only setting.

    UserError if that setting is useless here.
    """
    world, hardware = World(device=torch.device(device)), Hardware(cpu_bf16=cpu_bf16)
    if cpu_bf16:
        _check_cpu_bf16(hardware, world)
    return Layout(world, hardware, _dtype(hardware, world))


def _check(task: Laid, hardware: Hardware, world: World) -> None:
    if hardware.teacher != "whole" and task.through_teacher:
        raise UserError(
            f"teacher={hardware.teacher}: this method needs gradients through the teacher, which "
            "must stay whole on the device; use hardware.checkpointing=true, or the method dmd"
        )
    if world.size == 1:
        for name, value in (("sharding", "fsdp"), ("teacher", "sharded")):
            if getattr(hardware, name) == value:
                raise UserError(
                    f"{name}={value} needs several processes: start it with "
                    "`torchrun --nproc-per-node N -m koala distill ...`, or leave it out"
                )
    if hardware.teacher != "whole" and task.teacher is None:
        raise UserError(f"teacher={hardware.teacher}: this training has no teacher; leave it out")
    if hardware.teacher == "offloaded" and world.device.type == "cpu":
        raise UserError(
            "teacher=offloaded: on the CPU the teacher is in main memory anyway; leave it out"
        )
    check_fp16(hardware, world.device)
    if hardware.cpu_bf16:
        _check_cpu_bf16(hardware, world)
    if hardware.compile and hardware.compile not in torch._dynamo.list_backends(exclude_tags=()):
        raise UserError(
            f"compile={hardware.compile}: choose one of "
            f"{', '.join(torch._dynamo.list_backends(exclude_tags=()))}; usually inductor"
        )


def check_fp16(hardware: Hardware, device: torch.device) -> None:
    """UserError for fp16 elsewhere than on a GPU."""
    if hardware.fp16 and device.type != "cuda":
        raise UserError(
            f"fp16=true: it is for GPUs, and this run is on {device.type}; leave it out"
        )


def _check_cpu_bf16(hardware: Hardware, world: World) -> None:
    if world.device.type == "cuda":
        raise UserError("cpu_bf16=true: training on a GPU uses bf16 anyway; leave it out")
    if not has_bf16():
        raise UserError(
            f"cpu_bf16=true: {cpu_name()} has no bf16 instructions (avx512_bf16, amx_bf16 or "
            "bf16), so it would be slower; leave it out"
        )
    if hardware.checkpointing or hardware.compile:
        raise UserError(
            "cpu_bf16=true supports neither checkpointing nor compile: leave out one of them"
        )


def _to_channels_last(unet: nn.Module, sharded: bool) -> None:
    """Channels-last memory format for images, and for weights unless FSDP2 shards them."""
    if not sharded:
        unet.to(memory_format=torch.channels_last)
        return

    def convert(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].contiguous(memory_format=torch.channels_last),)

    unet.get_submodule("conv_in").register_forward_pre_hook(convert)


def _compile(found: list[Region], backend: str, dynamic: bool) -> None:
    """Compiles each region separately; regions of one shape share the code.

    dynamic: the code is for all sizes of images. Otherwise each would be compiled anew, of 41
    buckets more than the limit below allows.
    """
    torch._dynamo.config.recompile_limit = 256  # all regions are one function
    torch._dynamo.config.accumulated_recompile_limit = 256
    torch._dynamo.config.optimize_ddp = False  # regions are smaller than DDP's buckets
    for region in found:
        region.compute = torch.compile(region.compute, backend=backend, dynamic=dynamic)


def _checkpoint(found: list[Region]) -> None:
    """Drops activations inside the regions: the backward pass recomputes them."""
    for region in found:
        region.compute = partial(
            checkpoint, region.compute, use_reentrant=False, preserve_rng_state=False
        )


_AS_IT_IS = MixedPrecisionPolicy()


def _computing_in(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Gathers in the dtype that autocast computes in, half the bytes; gradients are summed in fp32.

    Inputs stay as they are: 16 bits would round image sizes.
    """
    if dtype == torch.float32:
        return _AS_IT_IS
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _shard(unet: nn.Module, world: World, policy: MixedPrecisionPolicy) -> FSDPModule:
    """FSDP2: parameters are sharded, and each region gathers its own when it runs."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for region in regions(unet):
        fully_shard(region.block, mesh=mesh, mp_policy=policy)
    # Reshard the rest after every forward pass: a backward pass may not follow.
    return fully_shard(unet, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def _offload(block: nn.Module, device: torch.device) -> None:
    """Keeps a frozen block's parameters in main memory except while it runs."""
    resting = {}
    for parameter in block.parameters():
        there = parameter.data.to("cpu")
        resting[parameter] = there.pin_memory() if device.type == "cuda" else there
        parameter.data = resting[parameter]

    def fetch(module: nn.Module, args: tuple) -> None:
        for parameter, weight in resting.items():
            parameter.data = weight.to(device, non_blocking=True, copy=True)

    def release(module: nn.Module, args: tuple, output: object) -> None:
        for parameter, weight in resting.items():
            parameter.data = weight

    block.register_forward_pre_hook(fetch)
    block.register_forward_hook(release)
