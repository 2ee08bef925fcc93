"""AUTOMATIC1111's "Hires. fix": each image is enlarged and drawn once more from that."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, Field

from koala.architectures.table import FACTOR
from koala.generation import Settings
from koala.serving.image_request import ImageRequest

_SIDE = Annotated[int, Field(ge=0, le=4096)]


class SecondPass(BaseModel):
    """The fields that belong to `enable_hr`."""

    hr_scale: Annotated[float, Field(ge=1, le=8)] = 2.0
    hr_resize_x: _SIDE = 0  # with hr_resize_y in place of hr_scale; 0: by the image's shape
    hr_resize_y: _SIDE = 0
    hr_second_pass_steps: int = 0  # 0: as many as the first pass
    hr_upscaler: str = "Lanczos"
    hr_prompt: str = ""  # "": that of the first pass
    hr_negative_prompt: str = ""
    denoising_strength: float = 0.7

    @staticmethod
    def of(given: Mapping[str, Any]) -> "SecondPass | None":
        """From a request's further fields; None if they ask for one pass. ValidationError."""
        if given.get("enable_hr") in (None, False, "", 0):
            return None
        return SecondPass.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )

    def ignored(self, given: Mapping[str, Any]) -> Iterator[str]:
        """The fields that ask for what is not here: other upscalers, samplers, models."""
        if self.hr_upscaler not in ("Lanczos", "None"):
            yield "hr_upscaler"
        for name, value in given.items():
            if name.startswith("hr_") and name not in type(self).model_fields and value:
                yield name

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The second pass' size, in multiples of 8, for a first one of width x height."""
        x, y = self.hr_resize_x, self.hr_resize_y
        scale = max(x / width, y / height) or self.hr_scale
        wanted = (x or width * scale, y or height * scale)
        return tuple(round(side / FACTOR) * FACTOR for side in wanted)  # type: ignore[return-value]

    def request(self, first: ImageRequest, image: Image.Image, settings: Settings) -> ImageRequest:
        """The second pass over an image of the first."""
        size = self.size(settings.width, settings.height)
        file = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(file, "PNG")
        return replace(
            first,
            prompt=self.hr_prompt or first.prompt,
            negative_prompt=self.hr_negative_prompt or first.negative_prompt,
            steps=self.hr_second_pass_steps or first.steps,
            size=f"{size[0]}x{size[1]}",
            number=1,
            seed=settings.seed,
            image=file.getvalue(),
            strength=self.denoising_strength,
            fit=False,  # that it is larger is the point
        )
