"""A request for images, the same for every API: OpenAI's, A1111's, jobs and the page."""

import base64
from dataclasses import asdict, dataclass, fields
from typing import Any

IMAGES = ("image", "mask")


@dataclass(frozen=True)
class ImageRequest:
    """`number` images of one prompt. `Service.requests` checks the values."""

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None  # as guidance and scheduler: the model's own
    guidance: float | None = None
    guidance_until: float = 1.0
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    size: str | None = None  # "WIDTHxHEIGHT"; None: the size of `image`, or the native size
    number: int = 1
    seed: int | None = None  # of the first image
    image: bytes | None = None  # an upload: PNG, JPEG or WebP
    mask: bytes | None = None  # an upload of the same size: light or transparent is repainted
    mask_blur: int | None = None  # pixels
    mask_fill: str | None = None  # one of `validation.MASK_FILLS`
    strength: float | None = None
    loras: tuple[tuple[str, float], ...] = ()  # (name in the LoRA folder, scale)
    fit: bool | None = None  # draw at the native area and resize; None: as the server does
    client: str = "anonymous"  # a key or an address, for fair queueing
    priority: int = 0  # lower runs first
    deadline: float | None = None  # seconds after acceptance

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, images as base64."""
        values = asdict(self)
        for name in IMAGES:
            if values[name] is not None:
                values[name] = base64.b64encode(values[name]).decode()
        return {**values, "loras": [list(pair) for pair in self.loras]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ImageRequest":
        """The inverse of `to_dict`. ValueError for unknown names."""
        unknown = set(values) - {field.name for field in fields(ImageRequest)}
        if unknown:
            raise ValueError(f"unknown fields of a request: {', '.join(sorted(unknown))}")
        given = {name: values.get(name) for name in IMAGES}
        images = {
            name: None if data is None else base64.b64decode(data, validate=True)
            for name, data in given.items()
        }
        loras = tuple((name, scale) for name, scale in values.get("loras", ()))
        return ImageRequest(**{**values, **images, "loras": loras})
