"""Weights of linear layers and convolutions in 8 bits: half of float16's memory.

Only the storage changes: a layer's weight is dequantised when it is used, one layer at a time, and
the arithmetic stays the model's own. So nothing needs calibration, and every device can do it.
Convolutions are a third of KOALA-700M's weights, so they are quantised too.

    int8   w = round(w / s) s,  s = max |w| / 127 of each output channel: error at most s / 2
    fp8    the same with e4m3 numbers and 448: finer near 0, coarser (1/16) at the top
"""

import torch
from torch import Tensor, nn

LARGEST = {"int8": 127.0, "fp8": 448.0}  # number of the kind
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SMALLEST = 2.0**-24  # scale: the smallest number that float16 has


class _Quantised(nn.Module):
    """A layer's mixin: the weight is computed at every use."""

    kind: str
    values: Tensor  # the kind's bits as uint8, which a change of dtype leaves alone; [out, ...]
    scale: Tensor  # [out, 1, ...], of the weight's dtype

    @property
    def weight(self) -> Tensor:
        """values * scale, in the scale's dtype. A new tensor: writing to it changes nothing."""
        return self.values.view(_DTYPES[self.kind]).to(self.scale.dtype).mul_(self.scale)

    @torch.no_grad()
    def take(self, kind: str) -> None:
        """Replaces the layer's weight parameter by 8-bit values."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        axes = tuple(range(1, weight.ndim))
        top = weight.float().abs().amax(axes, keepdim=True) / LARGEST[kind]
        # Rounded first, so that the values make up for the rounding of the scale.
        scale = top.clamp(min=_SMALLEST).to(weight.dtype)
        values = (weight.float() / scale.float()).clamp(-LARGEST[kind], LARGEST[kind])
        if kind == "int8":
            values = values.round()
        self.kind = kind
        self.register_buffer("values", values.to(_DTYPES[kind]).view(torch.uint8))
        self.register_buffer("scale", scale)


class QuantisedLinear(_Quantised, nn.Linear):  # type: ignore[override]  # weight: read, never set
    """A linear layer with an 8-bit weight."""


class QuantisedConv2d(_Quantised, nn.Conv2d):  # type: ignore[override]  # weight: as above
    """A convolution with an 8-bit weight."""


_QUANTISED: dict[type[nn.Module], type[_Quantised]] = {
    nn.Linear: QuantisedLinear,
    nn.Conv2d: QuantisedConv2d,
}


def quantise(model: nn.Module, kind: str) -> None:
    """Quantises the weight of every linear layer and convolution of `model` to `kind`, in place.

    kind: a key of `LARGEST`. A LoRA beside the weights goes on working; a layer that is quantised
    already is left alone. Biases, norms and embeddings keep their dtype.
    """
    for module in model.modules():
        if layer := _QUANTISED.get(type(module)):
            module.__class__ = layer
            assert isinstance(module, _Quantised)
            module.take(kind)
