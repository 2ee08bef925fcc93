"""The peak memory of a forward pass, found by running it on torch's meta device.

There a model has shapes and no numbers: a forward takes milliseconds and makes every tensor that
the real one makes. The sum of those alive at each moment gives the peak, for any model, size and
batch, with quantised layers and row tiling, and for a backward pass (`koala.recipes.memory`).

Workspaces of the libraries are not seen. Attention is taken to be one of torch's fused kernels,
which never hold the scores.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@torch.no_grad()
def peak_bytes(forward: Callable[[], Any]) -> int:
    """The most bytes alive at once of the tensors that `forward` makes, its result included.

    It runs on the meta device; tensors that exist before it are not counted.
    """
    with FusedAttention(), Alive() as alive:
        forward()
    return alive.peak


class Alive(TorchDispatchMode):
    """Adds up the storages that are made, and subtracts those that are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.setdefault(given.untyped_storage(), 0)
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: it makes the result, and what its gradient needs."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return _Attended.apply(query, key, value)
        return func(*args, **(kwargs or {}))


class _Attended(torch.autograd.Function):
    """Shapes of attention, heads before tokens: [n, heads, tokens, width]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = _by_token(query, value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # logarithms of softmax's
        ctx.save_for_backward(query, key, value, mixed, sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(_by_token(tensor, tensor.shape[-1]) for tensor in ctx.saved_tensors[:3])


def _by_token(like: Tensor, width: int) -> Tensor:
    """An empty [n, heads, tokens, width], laid out in memory as [n, tokens, heads, width]."""
    n, heads, tokens, _ = like.shape
    return like.new_empty(n, tokens, heads, width).transpose(1, 2)
