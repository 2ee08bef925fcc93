"""Linear layers that multiply in 8-bit floating point, for cards that do so (Ada, Hopper, later).

Both sides of the product are float8_e4m3fn: weights with one scale an output channel, kept so,
inputs with one scale a token, found anew each time. About half of a KOALA U-Net's arithmetic is in
linear layers; its convolutions stay as they are, since no library multiplies them in 8 bits.
Compiled blocks fold the scaling into what comes before; without, it costs more than it brings.
"""

import torch
from torch import Tensor, nn

from koala.errors import UserError

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_MULTIPLE = 16  # the product's hardware wants widths in this


class Float8Linear(nn.Module):
    """`nn.Linear` with 8-bit weights that quantises its input; [..., in] to [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _quantised(linear.weight.detach())
        self.register_buffer("weight", weight)  # [out, in]
        self.register_buffer("scale", scale.T.contiguous())  # float32 [1, out]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _quantised(x.flatten(0, -2))
        # Sums are float32 inside; products with a scale a row leave the card as bfloat16 only.
        product = torch._scaled_mm(
            rows, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16
        ).to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.unflatten(0, x.shape[:-1])


def to_float8(model: nn.Module, device: torch.device) -> int:
    """Replaces every linear layer that fits; in place, returns how many.

    Left alone are widths that are no multiple of 16, and the embeddings of time and size, which
    are small and carry the noise level. UserError on a card without 8-bit products.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"fp8: {torch.cuda.get_device_name(device)} does not multiply in 8 bits; choose bf16 "
            "or fp16"
        )
    count = 0
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            inside = ".attentions." in f".{path}."
            if inside and type(child) is nn.Linear and _fits(child):
                setattr(module, name, Float8Linear(child))
                count += 1
    return count


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % _MULTIPLE == 0 and linear.out_features % _MULTIPLE == 0


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float8 [n, d], and float32 [n, 1] that it must be multiplied by to be `rows` again."""
    largest = rows.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    scale = largest / _LARGEST
    return (rows.float() / scale).to(_FLOAT8), scale
