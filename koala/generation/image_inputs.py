"""Images to start from, as pixels; and previews of unfinished ones. Importing this loads no torch.

`koala.generation.image_files` opens the files.
"""

import numpy as np
from PIL import Image

from koala.architectures.table import FACTOR
from koala.generation.pixels import Decode
from koala.utils.arrays import Array, like, to_numpy

# Of the images that CLIP was trained on, in 0..1, red, green and blue.
_CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_CLIP_DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def on_white(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image as RGB of `size` (width, height), on white where it is transparent."""
    return on_ground(image, size, "white")


def on_ground(image: Image.Image, size: tuple[int, int], colour: str) -> Image.Image:
    """The same on another colour."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, colour)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    rgb = image.convert("RGB")
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return rgb


def for_clip(image: Image.Image, side: int) -> np.ndarray:
    """Float32 [1, 3, side, side], an image as CLIP was trained to read it.

    The shorter side is resized to `side`, and the middle square is cut out.
    """
    shorter = min(image.size)
    width, height = (int(side * one / shorter) for one in image.size)
    rgb = on_white(image, image.size).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.array(rgb.crop((left, top, left + side, top + side)), np.float32) / 255
    return ((pixels - _CLIP_MEAN) / _CLIP_DEVIATION).transpose(2, 0, 1)[None]


def to_pixels(image: Image.Image, factor: int = FACTOR) -> np.ndarray:
    """Float32 [1, 3, h, w] in -1..1 of an RGB image.

    Sides that are no multiple of `factor` are padded to one: with the last row and column.
    """
    pixels = np.array(image, np.float32).transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    padding = ((0, 0), (0, 0), (0, -image.height % factor), (0, -image.width % factor))
    return np.pad(pixels, padding, mode="edge")


def filled(image: Image.Image, places: np.ndarray, factor: int) -> Image.Image:
    """An RGB image with its surroundings drawn smoothly into what is repainted.

    places: bool [h, w] of the latent, factor x factor pixels each. The image is halved until
    nothing is missing, and each size fills in what the next larger one lacks (pull-push: Gortler
    and others 1996, "The Lumigraph"). All missing: the image as it is.
    """
    lacking = places.repeat(factor, 0).repeat(factor, 1)[: image.height, : image.width]
    if lacking.all():
        return image
    known = 1.0 - lacking[..., None]
    return Image.fromarray(_pulled(np.array(image, float), known).round().astype(np.uint8))


def _pulled(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """colours [h, w, 3] where known [h, w, 1] is not 0, else those of a half of the size."""
    if known.all():
        return colours
    padding = ((0, known.shape[0] % 2), (0, known.shape[1] % 2), (0, 0))
    weights, sums = (
        np.pad(a, padding).reshape(-(-a.shape[0] // 2), 2, -(-a.shape[1] // 2), 2, -1).sum((1, 3))
        for a in (known, colours * known)
    )
    half = _pulled(sums / np.maximum(weights, 1), (weights > 0).astype(float))
    size = (known.shape[1], known.shape[0])
    bands = [
        Image.fromarray(half[..., i]).resize(size, Image.Resampling.BILINEAR) for i in range(3)
    ]
    return np.where(known > 0, colours, np.stack([np.asarray(band) for band in bands], -1))


class Previewer:
    """Latents to colours by a linear map, one pixel per latent position: rough and very cheap.

    The map is fitted to the decoder: to the mean colours of 64 small constant latents, drawn with
    standard deviation one as the U-Net's are.
    """

    def __init__(self, decode: Decode, channels: int, kind: Array) -> None:
        """kind: any array of the kind that `decode` takes."""
        samples = np.random.RandomState(0).standard_normal((64, channels)).astype(np.float32)
        places = np.broadcast_to(samples[:, :, None, None], (64, channels, 4, 4))
        colours = to_numpy(decode(like(kind, np.ascontiguousarray(places))))
        known = np.concatenate([samples, np.ones((64, 1))], axis=1)
        means = colours.mean((2, 3), dtype=np.float64)
        self.map = np.linalg.lstsq(known, means, rcond=None)[0].astype(np.float32)  # [c + 1, 3]

    def __call__(self, latents: Array) -> Image.Image:
        """An RGB image of w x h pixels of latents [1, c, h, w] as the U-Net sees them."""
        places = to_numpy(latents)[0].transpose(1, 2, 0)
        colours = (places @ self.map[:-1] + self.map[-1]).clip(0, 1)
        return Image.fromarray((colours * 255).round().astype(np.uint8))
