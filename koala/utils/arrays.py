"""What NumPy's arrays and PyTorch's tensors do under different names, for code that takes either.

Operators, indexing, shapes, `clip`, `round` and `reshape` are the same in both. Importing this
loads no torch: whoever has a tensor has loaded it.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # a numpy.ndarray or a torch.Tensor; those of one call are of one kind


def joined(parts: Sequence[Array]) -> Array:
    """The arrays as one, along the first axis."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat([*parts])


def like(array: Array, values: Any) -> Array:
    """Numbers or a NumPy array as the kind of `array`, in its dtype and on its device."""
    if isinstance(array, np.ndarray):
        return np.asarray(values, array.dtype)
    import torch

    return torch.as_tensor(values, dtype=array.dtype, device=array.device)


def zeros_like(array: Array) -> Array:
    """Zeros of its kind, shape and dtype."""
    if isinstance(array, np.ndarray):
        return np.zeros_like(array)
    import torch

    return torch.zeros_like(array)


def deviation(array: Array) -> Array:
    """The standard deviation of all its numbers, with Bessel's correction; a scalar."""
    return array.std(ddof=1) if isinstance(array, np.ndarray) else array.std()


def to_numpy(array: Array) -> np.ndarray:
    """The array as NumPy's; a tensor in float32."""
    return array if isinstance(array, np.ndarray) else array.detach().float().cpu().numpy()


def all_finite(array: Array) -> bool:
    """Whether it holds neither NaN nor infinity."""
    if isinstance(array, np.ndarray):
        return bool(np.isfinite(array).all())
    return bool(array.isfinite().all())


def no_gradients() -> AbstractContextManager[Any]:
    """PyTorch's inference mode, if PyTorch is loaded."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.inference_mode()


def wait_for(array: Array) -> None:
    """Returns when a GPU, if it is on one, has computed it."""
    if getattr(array, "is_cuda", False):
        import torch

        torch.cuda.synchronize(array.device)


def numbers(kind: Array, values: Sequence[float]) -> Array:
    """Float32 numbers in the kind of array that `kind` is, on the CPU."""
    if isinstance(kind, np.ndarray):
        return np.array(values, np.float32)
    import torch

    return torch.tensor(values, dtype=torch.float32)
