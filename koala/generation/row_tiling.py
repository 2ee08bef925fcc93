"""Row tiling: the VAE on tiles of whole rows, with the same result in under half the memory.

Usual tiling cuts the latent and blends the overlaps. Each tile's group norms then see statistics
of their own, so tiles differ in colour, seams have to be hidden, and the overlap costs half as
much again. Here every layer works on the whole image, tile by tile: a norm takes its statistics
over all tiles, a convolution reads one row of each neighbour. So there are no seams, nothing is
computed twice, and the result differs by rounding only. A tile is freed as soon as the next layer
has read it, so about one tensor of a layer is alive instead of three.

Letters: n images, c channels, h x w positions of a layer. A layer's tensor is a list of tiles
[n, c, some of h, w], from top to bottom.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koala.utils.networks import AutoencoderKL, ResnetBlock2D

POSITIONS = 2**15  # of a tile, at most: 32 rows of an image 1024 pixels wide


def decode_tiled(vae: AutoencoderKL, z: Tensor, positions: int = POSITIONS) -> Tensor:
    """`vae.decode(z).sample` [n, 3, 8h, 8w], of latents [n, 4, h, w] in the VAE's own scale."""
    decoder = vae.decoder
    assert vae.post_quant_conv is not None
    assert isinstance(decoder.conv_norm_out, nn.GroupNorm)
    blocks: Iterable[Any] = decoder.up_blocks  # parts of a ModuleList have no type of their own
    tiles = [decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))]
    for block in blocks:
        for resnet in block.resnets:
            tiles = _resnet(resnet, tiles)
        for upsampler in block.upsamplers or ():
            tiles = list(_conv(upsampler.conv, _upsampled(tiles, positions)))
    normed = map(_normed(decoder.conv_norm_out, tiles), _popped(tiles))
    return torch.cat(list(_conv(decoder.conv_out, normed)), dim=2)


def encode_tiled(vae: AutoencoderKL, pixels: Tensor, positions: int = POSITIONS) -> Tensor:
    """`vae.encode(pixels).latent_dist.mode()` [n, 4, h, w], of pixels [n, 3, 8h, 8w]."""
    encoder = vae.encoder
    assert vae.quant_conv is not None
    blocks: Iterable[Any] = encoder.down_blocks
    factor = 2 ** (len(encoder.down_blocks) - 1)  # so that every tile can be halved to the end
    rows = factor * max(1, positions // (factor * pixels.shape[0] * pixels.shape[3]))
    # Called as a layer, like the decoder's first: the call brings offloaded weights.
    around = _with_neighbours(pixels.split(rows, dim=2))
    tiles = [encoder.conv_in(x)[:, :, 1:-1] for x in around]
    for block in blocks:
        for resnet in block.resnets:
            tiles = _resnet(resnet, tiles)
        for downsampler in block.downsamplers or ():
            tiles = list(_downsampled(downsampler.conv, tiles))
    x = encoder.mid_block(torch.cat(tiles, dim=2))
    x = encoder.conv_out(F.silu(encoder.conv_norm_out(x)))
    return vae.quant_conv(x).chunk(2, dim=1)[0]


def _resnet(block: ResnetBlock2D, tiles: list[Tensor]) -> list[Tensor]:
    """x + conv2(act(norm2(conv1(act(norm1(x)))))), x through a 1x1 convolution where widths change.

    Empties `tiles`.
    """
    norm = _normed(block.norm1, tiles)
    past: list[Tensor] = []

    def inner() -> Iterator[Tensor]:
        for x in _popped(tiles):
            past.append(x if block.conv_shortcut is None else block.conv_shortcut(x))
            yield norm(x)

    h = list(_conv(block.conv1, inner()))
    outer = map(_normed(block.norm2, h), _popped(h))
    return [y.add_(x) for y, x in zip(_conv(block.conv2, outer), _popped(past), strict=True)]


def _popped(tiles: list[Tensor]) -> Iterator[Tensor]:
    """The tiles, each popped from the list, so that only its user holds it."""
    tiles.reverse()
    while tiles:
        yield tiles.pop()


def _upsampled(tiles: list[Tensor], positions: int) -> Iterator[Tensor]:
    """Nearest-neighbour upsampling by 2, in tiles of at most `positions`."""
    for x in _popped(tiles):
        rows = max(1, positions // (4 * x.shape[0] * x.shape[3]))
        for part in x.split(rows, dim=2):
            yield F.interpolate(part, scale_factor=2.0)


def _downsampled(conv: nn.Conv2d, tiles: list[Tensor]) -> Iterator[Tensor]:
    """The 3x3 convolution of stride 2, over tiles of even height.

    As in diffusers' encoder, it is padded by one row below and one column on the right.
    """
    coming = _popped(tiles)
    x: Tensor | None = next(coming)
    assert x is not None
    while x is not None:
        after = next(coming, None)
        below = torch.zeros_like(x[:, :, :1]) if after is None else after[:, :, :1]
        rows = F.pad(torch.cat([x, below], dim=2), (0, 1))
        x = after
        yield F.conv2d(rows, conv.weight, conv.bias, stride=2)


def _normed(norm: nn.GroupNorm, tiles: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """tile -> silu(norm(tile)), with statistics over all tiles, in float32 as in torch."""
    n, c = tiles[0].shape[:2]
    count = sum(x.shape[2] * x.shape[3] for x in tiles) * c // norm.num_groups

    def over_groups(sums: list[Tensor]) -> Tensor:
        """Sums [n, c] of the tiles -> the mean of each channel's group, [n, c, 1, 1]."""
        groups = torch.stack(sums).sum(0).view(n, norm.num_groups, -1).sum(-1, keepdim=True)
        return (groups / count).expand(-1, -1, c // norm.num_groups).reshape(n, c, 1, 1)

    mean = over_groups([x.float().sum((2, 3)) for x in tiles])
    variance = over_groups([(x.float() - mean).square_().sum((2, 3)) for x in tiles])
    scale = norm.weight.float().view(1, c, 1, 1) * torch.rsqrt(variance + norm.eps)
    shift = norm.bias.float().view(1, c, 1, 1) - mean * scale
    return lambda x: F.silu(x.float().mul(scale).add_(shift), inplace=True).to(x.dtype)


def _conv(conv: nn.Conv2d, tiles: Iterable[Tensor]) -> Iterator[Tensor]:
    """The 3x3 convolution with padding 1, tile by tile."""
    for rows in _with_neighbours(tiles):
        yield F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _with_neighbours(tiles: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every tile with the row above and the row below it, zeros outside the image."""
    coming = iter(tiles)
    x: Tensor | None = next(coming)
    assert x is not None
    above = torch.zeros_like(x[:, :, :1])  # outside the image
    while x is not None:
        after = next(coming, None)
        below = torch.zeros_like(above) if after is None else after[:, :, :1]
        rows = torch.cat([above, x, below], dim=2)
        above, x = x[:, :, -1:].clone(), after
        yield rows
