"""The precision of a training: bf16 autocast on a GPU, float32 on a CPU.

A CPU with bf16 instructions may use autocast too (`Hardware.cpu_bf16`). PyTorch's attention and
group norm are slower there in bf16 than in float32 (attention's backward pass eight times), so
these two stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def computing(device: torch.device, cpu_bf16: bool = False) -> Iterator[None]:
    """Context of a forward pass: autocast if the device computes in bf16. Weights stay float32."""
    on_cpu = device.type == "cpu"
    low = cpu_bf16 if on_cpu else device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        if low and on_cpu:
            with _Float32Where():
                yield
        else:
            yield


class _Float32Where(TorchFunctionMode):
    """Attention and group norm in float32, with the result in the input's dtype."""

    _THESE = (F.scaled_dot_product_attention, F.group_norm)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._THESE:
            return func(*args, **kwargs)
        dtype = args[0].dtype
        with torch.autocast("cpu", enabled=False):
            args, kwargs = tree_map(_float32, (args, kwargs))
            return func(*args, **kwargs).to(dtype)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
