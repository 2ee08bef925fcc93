"""Sharded tensors (FSDP2's DTensors): to the local part, to the whole tensor, and back.

The rest of the package works on local parts, or on whole tensors as stored in checkpoints.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor sharded like `like`: on the CPU, contiguous, its own memory.

    fp32, or bytes as they are (the codes of 8-bit moments).

    tensor: the local part, or a DTensor. Every process must call this.
    """
    part = local(tensor).detach()
    if isinstance(like, DTensor):
        part = DTensor.from_local(
            part.to(like.device), like.device_mesh, like.placements,
            shape=like.shape, stride=like.stride(),
        ).full_tensor()  # fmt: skip
    dtype = torch.float32 if part.is_floating_point() else part.dtype
    return part.to("cpu", dtype, memory_format=torch.contiguous_format, copy=True)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The local part of `full` (equal in all processes), sharded like `like`."""
    if isinstance(like, DTensor):
        full = full.to(like.device)
        return distribute_tensor(
            full, like.device_mesh, like.placements, src_data_rank=None
        ).to_local()
    return full
