"""Weights of linear layers *and convolutions* in 8 bits: half of fp16's memory, little of its time.

Only storage changes: a layer's weight is made from its 8-bit values when it is used, one layer at
a time, and the arithmetic is the model's own. So nothing need be calibrated and every device can
do it. Convolutions are a third of KOALA-700M's weights; what leaves them out saves less than half.

    int8   w = round(w / s) s,  s = max |w| / 127 of each output channel: an error of at most s / 2
    fp8    the same with e4m3 numbers and 448: finer near 0, coarser (1/16) at the top
"""

import torch
from torch import Tensor, nn

LARGEST = {"int8": 127.0, "fp8": 448.0}  # of the kind's numbers
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SMALLEST = 2.0**-24  # scale: the smallest that float16 has


class _Packed(nn.Module):
    """Mixed into a layer: its weight is computed at every use."""

    kind: str
    values: Tensor  # the kind's bits as uint8, which no change of dtype touches; [out, ...]
    scale: Tensor  # [out, 1, ...], of the weight's dtype

    @property
    def weight(self) -> Tensor:
        """values * scale, in the scale's dtype. A new tensor: writing to it changes nothing."""
        return self.values.view(_DTYPES[self.kind]).to(self.scale.dtype).mul_(self.scale)

    @torch.no_grad()
    def pack(self, kind: str) -> None:
        """Takes the layer's weight parameter and keeps it in 8 bits."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        axes = tuple(range(1, weight.ndim))
        top = weight.float().abs().amax(axes, keepdim=True) / LARGEST[kind]
        # Rounded first, so that the values make up for what the scale's dtype cannot say.
        scale = top.clamp(min=_SMALLEST).to(weight.dtype)
        values = (weight.float() / scale.float()).clamp(-LARGEST[kind], LARGEST[kind])
        if kind == "int8":
            values = values.round()
        self.kind = kind
        self.register_buffer("values", values.to(_DTYPES[kind]).view(torch.uint8))
        self.register_buffer("scale", scale)


class PackedLinear(_Packed, nn.Linear):
    """A linear layer with an 8-bit weight."""


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution with an 8-bit weight."""


_PACKED: dict[type[nn.Module], type[_Packed]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
}


def quantise(model: nn.Module, kind: str) -> None:
    """Turns the weight of every linear layer and convolution of `model` into `kind`, in place.

    kind: a key of `LARGEST`. Layers stay what they are (a LoRA beside them goes on working); a
    layer that is packed already is left alone. Biases, norms and embeddings keep their dtype.
    """
    for module in model.modules():
        if packed := _PACKED.get(type(module)):
            module.__class__ = packed
            assert isinstance(module, _Packed)
            module.pack(kind)
