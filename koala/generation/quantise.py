"""Weights of linear layers and convolutions in 8 or 4 bits: half of float16's memory, or less.

Only the storage changes: a layer's weight is dequantised when it is used, one layer at a time, and
the arithmetic stays the model's own. So nothing needs calibration, and every device can do it.
Convolutions are a third of KOALA-700M's weights, so they are quantised too.

    int8   w = round(w / s) s,  s = max |w| / 127 of each output channel: error at most s / 2
    fp8    the same with e4m3 numbers and 448: finer near 0, coarser (1/16) at the top
    int4   whole numbers from -8 to 7 with a scale for each 32 weights of an output channel, the one
           of eight scales that leaves the least squared error. A U-Net's embeddings, first and
           last layers and stages, and the text encoders are int8: the image depends on them most
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koala.checkpoints.quantised import GROUP, IN_8_BITS, PARTS

LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}  # number of the kind
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CLIPS = tuple(1 - 0.05 * k for k in range(8))  # of a group's largest weight
_SMALLEST = 2.0**-24  # scale: the smallest number that float16 has


class Quantised(nn.Module):
    """A layer's mixin: the weight is computed at every use."""

    kind: str
    shape: torch.Size  # of the weight
    values: Tensor  # the kind's bits as uint8, which a change of dtype leaves alone; [out, ...]
    scale: Tensor  # [out, 1, ...], in int4 [out, groups, 1], of the weight's dtype
    left: Tensor  # [out, r], and right [r, inputs]: what is added to int4's; some layers have it
    right: Tensor

    @property
    def weight(self) -> Tensor:
        """values * scale, in the scale's dtype. A new tensor: writing to it changes nothing."""
        if self.kind == "int4":
            weight = _unpacked(self.values, self.scale, self.shape)
            if self.added:
                weight.flatten(1).addmm_(*self.added)
            return weight
        return self.values.view(_DTYPES[self.kind]).to(self.scale.dtype).mul_(self.scale)

    @property
    def added(self) -> tuple[Tensor, Tensor] | None:
        """left and right, if the layer has them."""
        return (self.left, self.right) if "left" in self._buffers else None

    def take(self, kind: str) -> None:
        """Replaces the layer's weight parameter by values of the kind."""
        weight = self._parameters["weight"]
        assert weight is not None
        self.hold(kind, *quantised(weight, kind))

    def hold(self, kind: str, values: Tensor, scale: Tensor, *added: Tensor) -> None:
        """Replaces the layer's weight parameter by these; added: left and right, or nothing."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.kind, self.shape = kind, weight.shape
        for name, tensor in zip(PARTS, (values, scale, *added), strict=False):
            self.register_buffer(name, tensor)


@torch.no_grad()
def quantised(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Values and scales of a weight, as `Quantised` holds them."""
    if kind == "int4":
        return _packed(weight)
    axes = tuple(range(1, weight.ndim))
    top = weight.float().abs().amax(axes, keepdim=True) / LARGEST[kind]
    # Rounded first, so that the values make up for the rounding of the scale.
    scale = top.clamp(min=_SMALLEST).to(weight.dtype)
    values = (weight.float() / scale.float()).clamp(-LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        values = values.round()
    return values.to(_DTYPES[kind]).view(torch.uint8), scale


@torch.no_grad()
def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left [out, r] and right [r, inputs] in float16, whose product is near the weight.

    What is left of it has fewer outliers, which 4 bits round best (SVDQuant, arXiv 2411.05007,
    section 4.2). The same on every call.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight.float().flatten(1), rank + 8, niter=4)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).half(), (v[:, :rank] * root).T.contiguous().half()


def _packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two values a byte, uint8 [out, groups, GROUP / 2], and their scales [out, groups, 1]."""
    if weight.is_meta:  # has no values to choose scales by
        shape = (len(weight), -(-weight[0].numel() // GROUP))
        return weight.new_empty(*shape, GROUP // 2, dtype=torch.uint8), weight.new_empty(*shape, 1)
    flat = weight.float().flatten(1)
    groups = F.pad(flat, (0, -flat.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = scale_of(groups, weight.dtype)
    return packed(whole(groups, scale)), scale


def scale_of(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale, [..., 1] in `dtype`, that rounds each group [..., GROUP] best."""
    top = groups.abs().amax(-1, keepdim=True) / LARGEST["int4"]
    scale = least = None
    for clip in _CLIPS:
        tried = (clip * top).clamp(min=_SMALLEST).to(dtype)
        error = (whole(groups, tried) * tried.float() - groups).square().sum(-1, keepdim=True)
        if scale is None or least is None:
            scale, least = tried, error
        else:
            scale = torch.where(error < least, tried, scale)
            least = torch.minimum(error, least)
    assert scale is not None
    return scale


def packed(numbers: Tensor) -> Tensor:
    """Whole numbers from -8 to 7, two a byte: [..., GROUP] -> uint8 [..., GROUP / 2]."""
    values = (numbers + 8).to(torch.uint8)
    return values[..., ::2] | values[..., 1::2] << 4


def whole(groups: Tensor, scale: Tensor) -> Tensor:
    """The whole numbers from -8 to 7 whose multiples of the scale are nearest to the groups."""
    return (groups / scale.float()).round().clamp(-8, LARGEST["int4"])


def _unpacked(values: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    numbers = torch.stack([values & 15, values >> 4], dim=-1).flatten(2).to(scale.dtype)
    flat = numbers.sub_(8).mul_(scale).flatten(1)
    return flat[:, : shape[1:].numel()].reshape(shape)


class QuantisedLinear(Quantised, nn.Linear):  # type: ignore[override]  # weight: read, never set
    """A linear layer with a weight of 8 or 4 bits."""


class QuantisedConv2d(Quantised, nn.Conv2d):  # type: ignore[override]  # weight: as above
    """A convolution with a weight of 8 or 4 bits."""


_LAYERS: dict[type[nn.Module], type[Quantised]] = {
    nn.Linear: QuantisedLinear,
    nn.Conv2d: QuantisedConv2d,
}


def quantise(model: nn.Module, kind: str) -> None:
    """Quantises the weight of every linear layer and convolution of `model` to `kind`, in place.

    kind: a key of `LARGEST`. A LoRA beside the weights goes on working; a layer that is quantised
    already is left alone. Biases, norms and embeddings keep their dtype.
    """
    for path, module in model.named_modules():
        quantise_layer(path, module, kind)


def quantise_layer(path: str, module: nn.Module, kind: str) -> None:
    """Does `quantise` for one module of a model, whose path tells how; others are left alone."""
    if can_be_quantised(module):
        module.__class__ = _LAYERS[type(module)]  # type: ignore[assignment]  # both are layers
        assert isinstance(module, Quantised)
        module.take("int8" if kind == "int4" and path.startswith(IN_8_BITS) else kind)


def can_be_quantised(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a module is a linear layer or convolution with a weight in floats."""
    # A pruned module may be its bias alone.
    return type(module) in _LAYERS and module.weight.numel() > 0  # type: ignore[operator]


def hold(module: nn.Module, path: str, tensors: Sequence[Tensor]) -> None:
    """Makes a U-Net's linear layer or convolution one of these tensors, in the order of `PARTS`."""
    module.__class__ = _LAYERS[type(module)]
    assert isinstance(module, Quantised)
    values, scale, *added = tensors
    module.hold("int8" if path.startswith(IN_8_BITS) else "int4", values, scale, *added)
