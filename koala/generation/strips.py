"""The VAE's decoder in strips of rows: the same picture in under half the memory.

Decoders are usually tiled by cutting the latent and blending the overlaps. Each tile's group norms
then see other statistics than the picture's, so tiles differ in colour, the overlap costs half as
much again, and the seams have to be hidden. Here every layer works on the whole picture instead,
and only its temporary tensors are cut: a norm takes its statistics over all strips, a convolution
reads one row beyond each side of its strip. So there are no seams, and the result differs from the
whole decoder's by rounding only. What is left is one input and one output of a layer at a time.

Letters: n pictures, c channels, h x w positions of a layer.
"""

from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = 2**16  # of a strip: 64 rows of a picture 1024 pixels wide

Rows = Callable[[int, int], Tensor]  # (first, end) -> those rows of a layer's input


def decode_in_strips(vae: AutoencoderKL, z: Tensor, positions: int = POSITIONS) -> Tensor:
    """`vae.decode(z).sample` [n, 3, 8h, 8w], of latents [n, 4, h, w] in the VAE's own scale."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, positions)
        for upsampler in block.upsamplers or ():
            x = _upsample(upsampler.conv, x, positions)
    normed = _normed(decoder.conv_norm_out, x, positions)
    return _conv(decoder.conv_out, normed, x.shape, positions)


def _resnet(block: nn.Module, x: Tensor, positions: int) -> Tensor:
    """x + conv2(act(norm2(conv1(act(norm1(x)))))). Where widths agree, x itself becomes the sum."""
    h = _conv(block.conv1, _normed(block.norm1, x, positions), x.shape, positions)
    if block.conv_shortcut is not None:
        x = _conv(block.conv_shortcut, _plain(x), x.shape, positions)
    return _conv(block.conv2, _normed(block.norm2, h, positions), x.shape, positions, onto=x)


def _upsample(conv: nn.Conv2d, x: Tensor, positions: int) -> Tensor:
    """The convolution of x, each of whose values has become four."""
    n, c, h, w = x.shape

    def rows(first: int, end: int) -> Tensor:
        doubled = F.interpolate(x[:, :, first // 2 : (end + 1) // 2], scale_factor=2.0)
        return doubled[:, :, first % 2 : first % 2 + end - first]

    return _conv(conv, rows, torch.Size((n, c, 2 * h, 2 * w)), positions)


def _plain(x: Tensor) -> Rows:
    return lambda first, end: x[:, :, first:end]


def _normed(norm: nn.GroupNorm, x: Tensor, positions: int) -> Rows:
    """Rows of silu(norm(x)), with the statistics of the whole x, in float32 as torch takes them."""
    n, c = x.shape[:2]
    per_group = x[0].numel() // norm.num_groups

    def over_groups(of_channels: Tensor) -> Tensor:
        """Sums [n, c] -> the mean of each channel's group [n, c, 1, 1]."""
        means = of_channels.view(n, norm.num_groups, -1).sum(-1, keepdim=True) / per_group
        return means.expand(-1, -1, c // norm.num_groups).reshape(n, c, 1, 1)

    strips = [x[:, :, a:b] for a, b in _strips(x.shape, positions)]
    mean = over_groups(sum(strip.float().sum((2, 3)) for strip in strips))
    squares = sum((strip.float() - mean).square_().sum((2, 3)) for strip in strips)
    scale = norm.weight.float().view(1, c, 1, 1) * torch.rsqrt(over_groups(squares) + norm.eps)
    shift = norm.bias.float().view(1, c, 1, 1) - mean * scale

    def rows(first: int, end: int) -> Tensor:
        y = x[:, :, first:end].float().mul(scale).add_(shift)
        return F.silu(y, inplace=True).to(x.dtype)

    return rows


def _conv(
    conv: nn.Conv2d, rows: Rows, shape: torch.Size, positions: int, onto: Tensor | None = None
) -> Tensor:
    """The convolution of an input of `shape` that `rows` gives; added to `onto` where it is given.

    Kernels 3x3 with padding 1, or 1x1 with none.
    """
    n, _, height, width = shape
    reach = conv.padding[0]
    out = onto
    if out is None:
        out = torch.empty(
            (n, conv.out_channels, height, width),
            dtype=conv.weight.dtype,
            device=conv.weight.device,
            memory_format=torch.channels_last,
        )
    for first, end in _strips(shape, positions):
        low, high = max(0, first - reach), min(height, end + reach)
        x = rows(low, high)
        outside = (reach - (first - low), reach - (high - end))  # rows above and below the picture
        if any(outside):
            x = F.pad(x, (0, 0, *outside))
        y = F.conv2d(x, conv.weight, conv.bias, padding=(0, reach))
        if onto is None:
            out[:, :, first:end] = y
        else:
            out[:, :, first:end] += y
    return out


def _strips(shape: torch.Size, positions: int) -> Iterator[tuple[int, int]]:
    """(first row, end row) of each strip."""
    n, _, height, width = shape
    step = max(1, positions // (n * width))
    return ((first, min(first + step, height)) for first in range(0, height, step))
