"""Frames of animated images and pages of others, of which only the first is ever read."""

from PIL import Image

_OTHER_PICTURES = ("MPO",)  # a phone's JPEG, with a thumbnail or a second lens's view


def frames_of(image: Image.Image) -> int:
    """How many an opened image file has; 1 where that cannot be told."""
    if image.format in _OTHER_PICTURES:
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except (OSError, ValueError, SyntaxError, EOFError):  # damaged after the first
        return 1
