"""The precision of a training: autocast to bf16 on a GPU, or to fp16 on an older one and where
`Hardware.fp16` asks for it; float32 on a CPU.

A CPU with bf16 instructions may use autocast too (`Hardware.cpu_bf16`). PyTorch's attention and
group norm are slower there in bf16 than in float32 (attention's backward pass eight times), so
these two stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context of a forward pass: autocast to `dtype`, none if it is float32. Weights stay so."""
    low = dtype != torch.float32
    with torch.autocast(device.type, dtype if low else None, enabled=low):
        if low and device.type == "cpu":
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
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW else value


_LOW = (torch.bfloat16, torch.float16)


class LossScale:
    """The factor of the loss of a training in fp16, whose small gradients would else be zero
    (Micikevicius et al., arXiv 1710.03740, section 3.2); 1 in any other dtype.

    A step whose gradients overflow is computed again at half the factor, so no sample is lost. A
    power of two rounds nothing, so a resumed run may begin with the first one again.
    """

    FIRST = 2.0**16
    PATIENCE = 2_000  # steps without an overflow until it is doubled

    def __init__(self, dtype: torch.dtype) -> None:
        self._on = dtype == torch.float16
        self.value = self.FIRST if self._on else 1.0
        self._steps = 0

    def overflowed(self, norm: float) -> bool:
        """Whether a step must be computed again. norm: of its gradients, divided by `value`."""
        if self._on and not math.isfinite(norm) and self.value > 1:
            self.value /= 2
            self._steps = 0
            return True
        self._steps += 1
        if self._on and self._steps % self.PATIENCE == 0:
            self.value *= 2
        return False

    @torch.no_grad()
    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the parameters' gradients by `value`."""
        if self._on:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.value)
