"""AUTOMATIC1111's "Only masked": the masked part of an image is cut out, drawn alone and put back.

So a small part of a large image is drawn at the model's own size. What the mask leaves dark comes
back pixel for pixel.
"""

from dataclasses import dataclass, replace

from PIL import Image

from koala.errors import UserError
from koala.generation import Settings
from koala.generation.image_files import LIGHT, as_grey
from koala.generation.image_inputs import on_white
from koala.serving.fit import matched

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class MaskedPart:
    """The part of an image that is drawn."""

    whole: Image.Image  # RGB
    mask: Image.Image  # "L" of the part: 255 is repainted, 0 is kept
    box: Box

    @staticmethod
    def of(
        image: Image.Image, mask: Image.Image, padding: int, shape: tuple[int, int] | None
    ) -> "MaskedPart":
        """The part around what is light in the mask, `padding` pixels wider on each side.

        shape: (width, height) whose proportions it is to have, where the image is large enough.
        UserError for a mask of another size, or dark everywhere.
        """
        mask = matched(mask, image)
        if mask.size != image.size:
            raise UserError(
                f"the mask is {mask.width}x{mask.height}, its image {image.width}x{image.height}: "
                "make them the same size"
            )
        light = as_grey(mask).point(lambda grey: 255 if grey >= LIGHT else 0)
        inner = light.getbbox()
        if inner is None:
            raise UserError("the mask is dark everywhere: make the part to repaint light")
        box = around(inner, padding, shape, image.size)
        return MaskedPart(on_white(image, image.size), light.crop(box), box)

    @property
    def image(self) -> Image.Image:
        """What it shows before it is drawn."""
        return self.whole.crop(self.box)

    def settings(self, drawn: Settings) -> Settings:
        """The whole image's settings, from those that the part was drawn with."""
        left, top = self.box[:2]
        return replace(
            drawn,
            enlarged=f"{self.whole.width}x{self.whole.height}",
            pasted=f"{self.mask.width}x{self.mask.height}+{left}+{top}",
        )

    def put_back(self, drawn: Image.Image) -> Image.Image:
        """The whole image with the part as drawn, at any size."""
        whole = self.whole.copy()
        whole.paste(drawn.resize(self.mask.size, Image.Resampling.LANCZOS), self.box[:2], self.mask)
        return whole


def around(inner: Box, padding: int, shape: tuple[int, int] | None, size: tuple[int, int]) -> Box:
    """The box `padding` pixels around `inner` in the proportions of `shape`, within `size`."""
    left, top, right, bottom = inner
    left, right = max(0, left - padding), min(size[0], right + padding)
    top, bottom = max(0, top - padding), min(size[1], bottom + padding)
    if shape is not None:
        width, height = right - left, bottom - top
        left, right = _widened(left, right, round(height * shape[0] / shape[1]), size[0])
        top, bottom = _widened(top, bottom, round(width * shape[1] / shape[0]), size[1])
    return left, top, right, bottom


def _widened(low: int, high: int, wanted: int, most: int) -> tuple[int, int]:
    """The span with `wanted` pixels, if it has fewer, about its middle and within 0 to `most`."""
    missing = min(wanted, most) - (high - low)
    if missing <= 0:
        return low, high
    low = min(max(0, low - missing // 2), most - (high - low) - missing)
    return low, low + min(wanted, most)
