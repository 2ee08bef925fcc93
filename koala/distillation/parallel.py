"""Processes and devices of a training: who takes part, and how models are laid over them.

Everything of the kind is here and is done to a model from outside, in the one order of `lay_out`;
tasks and models know nothing of it, and the loop asks a `Layout` what it has to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from koala.distillation.settings import PLAIN, Hardware
from koala.distillation.taps import Region, regions
from koala.errors import FailedElsewhere, Failure, UserError
from koala.utils.device import cpu_name, has_bf16, pick_device


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes of fp32 values on the CPU, the same in all of them."""
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def failure(self, message: str) -> Failure:
        """What to raise where all processes fail alike: the first one says why."""
        return Failure(message) if self.first else FailedElsewhere(message)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all, and the lowest that failed says why."""
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


@contextmanager
def joined(device: str | None = None) -> Iterator[World]:
    """Joins the processes that torchrun started, each on a device of its own; else this one alone.

    device: "cpu" or "cuda"; None picks the best there is. UserError where a machine has fewer GPUs
    than processes, or where one GPU is named for several processes.
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
                f"{wanted} processes on this machine need a GPU each, {device or 'cuda'} gives "
                f"{there if picked.index is None else 1}: start as many processes as there are "
                "GPUs, with --device cuda or none"
            )
        picked = torch.device("cuda", here)
        torch.cuda.set_device(picked)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo")
    yield World(rank, size, picked)
    distributed.destroy_process_group()  # not after an error: others may still wait for this one


class Laid(Protocol):
    """What `lay_out` asks of a task; see `koala.distillation.tasks`."""

    @property
    def trainable(self) -> nn.Module: ...
    @property
    def teacher(self) -> UNet2DConditionModel | None: ...
    def call_through(self, wrapped: nn.Module) -> None: ...


@dataclass(frozen=True)
class Layout:
    """How a training is laid out; by default in this process, on the device where it is."""

    world: World = World()
    hardware: Hardware = PLAIN
    replicas: DistributedDataParallel | None = None

    def computing(self, last: bool) -> AbstractContextManager:
        """Around each part of a step; replicas exchange gradients in the `last` one alone."""
        if self.replicas is None or last:
            return contextlib.nullcontext()
        return self.replicas.no_sync()


def lay_out(task: Laid, hardware: Hardware, world: World) -> Layout:
    """Lays a task's models over the processes and devices. UserError for what cannot be.

    The order matters:
    1. taps sit on the raw modules already, since the task was made;
    2. memory format;
    3. compiling of each region, its features being outputs of it;
    4. checkpointing around what was compiled;
    5. FSDP2 or DDP around all.
    """
    with world.together():
        _check(task, hardware, world)
    student, teacher = task.trainable, task.teacher
    networks = [student] if teacher is None else [student, teacher]
    if hardware.channels_last:
        _to_channels_last(student, sharded=hardware.sharding == "fsdp")
        if teacher is not None:
            _to_channels_last(teacher, sharded=hardware.teacher == "sharded")
    if hardware.compile:
        _compile([region for network in networks for region in regions(network)], hardware.compile)
    if hardware.checkpointing:
        _checkpoint(regions(student))
    if teacher is not None and hardware.teacher == "offloaded":
        for region in regions(teacher):
            _offload(region.block, world.device)
    if teacher is not None and hardware.teacher == "sharded":
        _shard(teacher, world)
    if hardware.sharding == "fsdp":
        _shard(student, world)
    elif world.size > 1:
        replicas = DistributedDataParallel(
            student,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        task.call_through(replicas)
        return Layout(world, hardware, replicas)
    return Layout(world, hardware)


def alone(device: str, cpu_bf16: bool) -> Layout:
    """The layout of a training in one process whose only setting is `Hardware.cpu_bf16`.

    UserError where that is no use.
    """
    world, hardware = World(device=torch.device(device)), Hardware(cpu_bf16=cpu_bf16)
    if cpu_bf16:
        _check_cpu_bf16(hardware, world)
    return Layout(world, hardware)


def _check(task: Laid, hardware: Hardware, world: World) -> None:
    if world.size == 1:
        for name, value in (("sharding", "fsdp"), ("teacher", "sharded")):
            if getattr(hardware, name) == value:
                raise UserError(
                    f"{name}={value} needs several processes: start with "
                    "`torchrun --nproc-per-node N -m koala distill ...`, or leave it out"
                )
    if hardware.teacher != "whole" and task.teacher is None:
        raise UserError(f"teacher={hardware.teacher}: no teacher runs here; leave it out")
    if hardware.teacher == "offloaded" and world.device.type == "cpu":
        raise UserError("teacher=offloaded: on the CPU it is in main memory anyway; leave it out")
    if hardware.cpu_bf16:
        _check_cpu_bf16(hardware, world)
    if hardware.compile and hardware.compile not in torch._dynamo.list_backends(exclude_tags=()):
        raise UserError(
            f"compile={hardware.compile}: there are "
            f"{', '.join(torch._dynamo.list_backends(exclude_tags=()))}; inductor is usual"
        )


def _check_cpu_bf16(hardware: Hardware, world: World) -> None:
    if world.device.type == "cuda":
        raise UserError("cpu_bf16=true: on a GPU a training is in bf16 anyway; leave it out")
    if not has_bf16():
        raise UserError(
            f"cpu_bf16=true: {cpu_name()} does not multiply bf16 (avx512_bf16, amx_bf16 or "
            "bf16 among its flags), so it would be slower; leave it out"
        )
    if hardware.checkpointing or hardware.compile:
        raise UserError(
            "cpu_bf16=true goes neither with checkpointing nor with compile: leave out one of them"
        )


def _to_channels_last(unet: nn.Module, sharded: bool) -> None:
    """Images as [n, h, w, c] in memory; weights too, unless FSDP2 has them, which cannot."""
    if not sharded:
        unet.to(memory_format=torch.channels_last)
        return

    def convert(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].contiguous(memory_format=torch.channels_last),)

    unet.get_submodule("conv_in").register_forward_pre_hook(convert)


def _compile(found: list[Region], backend: str) -> None:
    """Compiles each region by itself; those of one shape share the result."""
    torch._dynamo.config.recompile_limit = 256  # all regions are one function to it
    torch._dynamo.config.accumulated_recompile_limit = 256
    torch._dynamo.config.optimize_ddp = False  # regions are smaller than DDP's buckets
    for region in found:
        region.compute = torch.compile(region.compute, backend=backend)


def _checkpoint(found: list[Region]) -> None:
    """Keeps no activations inside the regions: the backward pass computes them again."""
    for region in found:
        region.compute = partial(
            checkpoint, region.compute, use_reentrant=False, preserve_rng_state=False
        )


def _shard(unet: nn.Module, world: World) -> None:
    """FSDP2: parameters lie in shards, and each region gathers its own when it computes."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for region in regions(unet):
        fully_shard(region.block, mesh=mesh)
    # The rest too, after every pass: where no backward pass follows, nothing else would.
    fully_shard(unet, mesh=mesh, reshard_after_forward=True)


def _offload(block: nn.Module, device: torch.device) -> None:
    """Keeps a frozen block's parameters in main memory except while it computes."""
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
