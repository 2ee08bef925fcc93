"""Which device does the work: the best one there is, unless another is asked for."""

import torch

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
