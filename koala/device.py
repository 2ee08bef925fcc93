"""Which device does the work: the best there is, unless another is asked for; and the way there."""

import torch
from torch import Tensor, nn

from koala.errors import UserError


def pick_device(asked: torch.device | str | None = None) -> torch.device:
    """The device asked for, if it is there (else UserError); None means the best one."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if asked is None:
        return torch.device(there[0])
    try:
        found = torch.device(asked)
    except RuntimeError:
        found = None
    if found is None or found.type not in there:
        raise UserError(f"device {str(asked)!r} is not there: this machine has {', '.join(there)}")
    return found


def whereabouts(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model, by its first parameter.

    diffusers' own properties look through every module each time, which costs more at each step
    than to launch some layers.
    """
    first = next(model.parameters())
    return first.device, first.dtype


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. To CUDA the host does not wait until it is there.

    For that it goes from pinned memory: from any other the copy waits for all work before it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
