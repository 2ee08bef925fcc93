"""Tensors of which each process may hold a part (FSDP2's DTensors): the part, the whole, and back.

All else in the package works on the part that lies here, or on the whole as it lies on the disk.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part that lies in this process, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole of what is sharded as `like` is: fp32 on the CPU, contiguous, its own memory.

    tensor: the local part, or a DTensor. Every process must call this.
    """
    part = local(tensor).detach()
    if isinstance(like, DTensor):
        part = DTensor.from_local(
            part.to(like.device), like.device_mesh, like.placements,
            shape=like.shape, stride=like.stride(),
        ).full_tensor()  # fmt: skip
    return part.to("cpu", torch.float32, memory_format=torch.contiguous_format, copy=True)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The local part of `full`, the same in every process, sharded as `like` is."""
    if isinstance(like, DTensor):
        full = full.to(like.device)
        return distribute_tensor(
            full, like.device_mesh, like.placements, src_data_rank=None
        ).to_local()
    return full
