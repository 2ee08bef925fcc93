"""The VAE in strips of rows: the same picture, or latents, in under half the memory.

Decoders are usually tiled by cutting the latent and blending the overlaps. Each tile's group norms
then see other statistics than the picture's, so tiles differ in colour, the overlap costs half as
much again, and the seams have to be hidden. Here every layer works on the whole picture instead,
strip by strip: a norm takes its statistics over all strips, a convolution looks one row into each
neighbour. So there are no seams, nothing is computed twice, and the result differs from the whole
decoder's by rounding only. A strip is let go as soon as its successor has been made of it, so that
about one tensor of a layer is alive instead of three.

Letters: n pictures, c channels, h x w positions of a layer. A layer's tensor is a list of strips
[n, c, some of h, w], from top to bottom.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = 2**15  # of a strip, at most: 32 rows of a picture 1024 pixels wide


def decode_in_strips(vae: AutoencoderKL, z: Tensor, positions: int = POSITIONS) -> Tensor:
    """`vae.decode(z).sample` [n, 3, 8h, 8w], of latents [n, 4, h, w] in the VAE's own scale."""
    decoder = vae.decoder
    strips = [decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))]
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            strips = _resnet(resnet, strips)
        for upsampler in block.upsamplers or ():
            strips = list(_conv(upsampler.conv, _doubled(strips, positions)))
    normed = map(_normed(decoder.conv_norm_out, strips), _taken(strips))
    return torch.cat(list(_conv(decoder.conv_out, normed)), dim=2)


def encode_in_strips(vae: AutoencoderKL, pixels: Tensor, positions: int = POSITIONS) -> Tensor:
    """`vae.encode(pixels).latent_dist.mode()` [n, 4, h, w], of pixels [n, 3, 8h, 8w]."""
    encoder = vae.encoder
    factor = 2 ** (len(encoder.down_blocks) - 1)  # that every strip can be halved to the end
    rows = factor * max(1, positions // (factor * pixels.shape[0] * pixels.shape[3]))
    # Called as a layer, as the decoder's first is: weights that are away come with the call.
    around = _with_neighbours(pixels.split(rows, dim=2))
    strips = [encoder.conv_in(x)[:, :, 1:-1] for x in around]
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            strips = _resnet(resnet, strips)
        for downsampler in block.downsamplers or ():
            strips = list(_halved(downsampler.conv, strips))
    x = encoder.mid_block(torch.cat(strips, dim=2))
    x = encoder.conv_out(F.silu(encoder.conv_norm_out(x)))
    return vae.quant_conv(x).chunk(2, dim=1)[0]


def _resnet(block: nn.Module, strips: list[Tensor]) -> list[Tensor]:
    """x + conv2(act(norm2(conv1(act(norm1(x)))))), x through a 1x1 convolution where widths change.

    Empties `strips`.
    """
    norm = _normed(block.norm1, strips)
    past: list[Tensor] = []

    def inner() -> Iterator[Tensor]:
        for x in _taken(strips):
            past.append(x if block.conv_shortcut is None else block.conv_shortcut(x))
            yield norm(x)

    h = list(_conv(block.conv1, inner()))
    outer = map(_normed(block.norm2, h), _taken(h))
    return [y.add_(x) for y, x in zip(_conv(block.conv2, outer), _taken(past), strict=True)]


def _taken(strips: list[Tensor]) -> Iterator[Tensor]:
    """The strips, each taken off the list, so that nothing but its user holds it."""
    strips.reverse()
    while strips:
        yield strips.pop()


def _doubled(strips: list[Tensor], positions: int) -> Iterator[Tensor]:
    """Each value as 2 x 2 of them, in strips that have no more than `positions`."""
    for x in _taken(strips):
        rows = max(1, positions // (4 * x.shape[0] * x.shape[3]))
        for part in x.split(rows, dim=2):
            yield F.interpolate(part, scale_factor=2.0)


def _halved(conv: nn.Conv2d, strips: list[Tensor]) -> Iterator[Tensor]:
    """The 3x3 convolution in steps of two, over strips of even height.

    As diffusers' encoder has it, it looks one row and column beyond the lower right edges.
    """
    coming = _taken(strips)
    x: Tensor | None = next(coming)
    while x is not None:
        after = next(coming, None)
        below = torch.zeros_like(x[:, :, :1]) if after is None else after[:, :, :1]
        rows = F.pad(torch.cat([x, below], dim=2), (0, 1))
        x = after
        yield F.conv2d(rows, conv.weight, conv.bias, stride=2)


def _normed(norm: nn.GroupNorm, strips: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """strip -> silu(norm(strip)), with statistics over all strips, in float32 as torch has them."""
    n, c = strips[0].shape[:2]
    count = sum(x.shape[2] * x.shape[3] for x in strips) * c // norm.num_groups

    def over_groups(sums: list[Tensor]) -> Tensor:
        """Sums [n, c] of strips -> the mean of each channel's group, [n, c, 1, 1]."""
        groups = torch.stack(sums).sum(0).view(n, norm.num_groups, -1).sum(-1, keepdim=True)
        return (groups / count).expand(-1, -1, c // norm.num_groups).reshape(n, c, 1, 1)

    mean = over_groups([x.float().sum((2, 3)) for x in strips])
    variance = over_groups([(x.float() - mean).square_().sum((2, 3)) for x in strips])
    scale = norm.weight.float().view(1, c, 1, 1) * torch.rsqrt(variance + norm.eps)
    shift = norm.bias.float().view(1, c, 1, 1) - mean * scale
    return lambda x: F.silu(x.float().mul(scale).add_(shift), inplace=True).to(x.dtype)


def _conv(conv: nn.Conv2d, strips: Iterable[Tensor]) -> Iterator[Tensor]:
    """The 3x3 convolution with padding 1 of the whole, strip by strip."""
    for rows in _with_neighbours(strips):
        yield F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _with_neighbours(strips: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every strip with the row above and the row below it, zeros outside the picture."""
    coming = iter(strips)
    x = next(coming)
    above = torch.zeros_like(x[:, :, :1])  # outside the picture
    while x is not None:
        after = next(coming, None)
        below = torch.zeros_like(above) if after is None else after[:, :, :1]
        rows = torch.cat([above, x, below], dim=2)
        above, x = x[:, :, -1:].clone(), after
        yield rows
