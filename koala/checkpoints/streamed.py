"""Networks that are never in memory as a whole: a layer's weights are read when it runs.

Between, they are one number that stands for all of them, so that a module still has the shapes,
dtypes and device that its callers ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from koala.checkpoints.tensors import Stored, View, load_tensor, not_finite

if TYPE_CHECKING:
    from typing import TypeAlias

    Weights: TypeAlias = Mapping[str, Tensor]  # by name, float32 on the CPU


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of files in float32, each read when it is asked for.

    UserError for one that holds NaN or infinity.
    """

    def __init__(self, stored: Mapping[str, Stored | View]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = load_tensor(self.stored[name], "F32")
        if tensor.numel() and not tensor.abs().max().isfinite():
            raise not_finite(self.stored[name], name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def stream(model: nn.Module, weights: Weights) -> None:
    """Makes a model read its layers' weights as they run; its own, on the meta device, are gone.

    In a backward pass the graph holds the weights of the layers that it goes through.
    """
    for path, module in model.named_modules():
        names = {key: f"{path}.{key}" for key, own in module._parameters.items() if own is not None}
        if names:
            _stream(module, names, weights)


def _stream(module: nn.Module, names: Mapping[str, str], weights: Weights) -> None:
    absent = {
        key: nn.Parameter(torch.zeros(()).expand(module.get_parameter(key).shape), False)
        for key in names
    }

    def read(module: nn.Module, inputs: Any) -> None:
        for key, name in names.items():
            module._parameters[key] = nn.Parameter(weights[name], requires_grad=False)

    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(absent)

    module._parameters.update(absent)
    module.register_forward_pre_hook(read)
    module.register_forward_hook(drop)
