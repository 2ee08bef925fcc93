"""What one client asks for, whichever way it asks: OpenAI's API, A1111's, a job, the page."""

import base64
from dataclasses import asdict, dataclass, fields
from typing import Any

PICTURES = ("image", "mask")
INTERACTIVE, BATCH = 0, 1


@dataclass(frozen=True)
class Order:
    """`number` pictures of one prompt. Nothing is checked here: `Service.requests` does that."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 10
    guidance: float = 3.5
    guidance_until: float = 1.0
    scheduler: str = "euler"
    size: str | None = None  # "WIDTHxHEIGHT"; None: that of `image`, or the model's own
    number: int = 1
    seed: int | None = None  # of the first picture
    image: bytes | None = None  # an upload: PNG, JPEG or WebP
    mask: bytes | None = None  # an upload, of the same size: light is painted anew
    strength: float | None = None
    loras: tuple[tuple[str, float], ...] = ()  # names in the allowed folder, and scales
    client: str = "anonymous"  # who shares the machine fairly with others: a key or an address
    priority: int = INTERACTIVE  # lower comes first
    deadline: float | None = None  # seconds from when it is taken in

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it, pictures as base64."""
        values = asdict(self)
        for name in PICTURES:
            if values[name] is not None:
                values[name] = base64.b64encode(values[name]).decode()
        return {**values, "loras": [list(pair) for pair in self.loras]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Order":
        """The order of `to_dict`'s values. ValueError for anything else."""
        unknown = set(values) - {field.name for field in fields(Order)}
        if unknown:
            raise ValueError(f"not of an order: {', '.join(sorted(unknown))}")
        given = {name: values.get(name) for name in PICTURES}
        pictures = {
            name: None if data is None else base64.b64decode(data, validate=True)
            for name, data in given.items()
        }
        loras = tuple((name, scale) for name, scale in values.get("loras", ()))
        return Order(**{**values, **pictures, "loras": loras})
