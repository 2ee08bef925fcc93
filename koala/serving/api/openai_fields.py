"""The fields of OpenAI's images API. Each takes effect, is checked and ignored, or is rejected.

`style`, `moderation`, `user`, `safety_identifier` and `input_fidelity` are checked and have no
effect, and so has `quality` unless the server maps it to steps. Our own additional fields are seed,
steps, guidance, guidance_until, guidance_rescale, negative_prompt, scheduler, fit, strength,
mask_blur, mask_fill and lora.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from koala.serving.api.values import Number, SamplerName, Size, Whole, told, whole
from koala.serving.errors import ApiError
from koala.serving.image_request import ImageRequest

# Names that other servers and libraries give our fields.
OTHER_NAMES = {
    "batch_size": "n",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "image_size": "size",
    "num_images": "n",
    "num_images_per_prompt": "n",
    "num_inference_steps": "steps",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
}
# Values that other servers and libraries give ours.
OTHER_VALUES = {"output_format": {"jpg": "jpeg"}, "response_format": {"base64": "b64_json"}}


def _size_of_sides(values: dict[str, Any]) -> str:
    """The size that width and height say, which it takes out. ValueError."""
    width, height = values.pop("width", None), values.pop("height", None)
    if None in (width, height) or "size" in values:
        raise ValueError("give width and height, or size alone")
    return f"{whole(width)}x{whole(height)}"


class LoraScale(BaseModel):
    """A LoRA in the server's folder, and its scale."""

    model_config = ConfigDict(extra="forbid")
    name: str
    scale: Number = 1.0


class GenerationRequest(BaseModel):
    """The fields that generations and edits share."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    model: str | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    size: Size = None
    response_format: str | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = None
    background: str | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    stream: bool | None = None
    partial_images: Annotated[Whole, Field(ge=0, le=3)] | None = None
    seed: Whole | None = None
    steps: Whole | None = None
    guidance: Number | None = None
    guidance_until: Number | None = None
    guidance_rescale: Number | None = None
    negative_prompt: str | None = None
    scheduler: SamplerName = None
    fit: bool | None = None
    lora: Annotated[list[LoraScale], Field(max_length=8)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_our_names(cls, given: Any) -> Any:
        """Understands OTHER_NAMES, width with height, and a seed of -1 for a random one."""
        if not isinstance(given, dict):
            return given
        values = told(given)
        for other in [name for name in OTHER_NAMES if name in values]:
            name, value = OTHER_NAMES[other], values.pop(other)
            if values.get(name) is not None:
                raise ValueError(f"{other} and {name} are one field: give one")
            values[name] = value
        if "width" in values or "height" in values:
            values["size"] = _size_of_sides(values)
        if values.get("seed") in (-1, "-1"):
            del values["seed"]
        for name, others in OTHER_VALUES.items():
            if isinstance(values.get(name), str):
                values[name] = others.get(values[name], values[name])
        return values

    def check(self, model: str, aliases: tuple[str, ...] = ()) -> None:
        """Raises ApiError for what a server of this model cannot do."""
        if self.model not in (None, model, *aliases):
            raise ApiError(
                404, f"unknown model {self.model!r}: this server has {model!r}; it can be given "
                "other names by --model-alias", "model_not_found", "model",
            )  # fmt: skip
        if self.response_format not in (None, "b64_json", "url"):
            raise ApiError(
                400, f"response_format {self.response_format!r}: allowed are b64_json and url",
                "invalid_value", "response_format",
            )  # fmt: skip
        if self.response_format == "url" and (self.stream or self.format != "png"):
            raise ApiError(
                400, "response_format url is for PNGs that are not streamed: leave out stream and "
                "output_format, or take b64_json", "invalid_value", "response_format",
            )  # fmt: skip
        if self.background not in (None, "auto", "opaque"):
            raise ApiError(
                400, f"background {self.background!r}: images are opaque; leave it out",
                "invalid_value", "background",
            )  # fmt: skip
        if self.format == "png" and self.output_compression not in (None, 100):
            raise ApiError(
                400, "output_compression applies to webp and jpeg: leave it out for png",
                "invalid_value", "output_compression",
            )  # fmt: skip
        if self.partial_images and not self.stream:
            raise ApiError(
                400, "partial_images needs stream: set stream to true", "invalid_value",
                "partial_images",
            )  # fmt: skip

    @property
    def format(self) -> str:
        return self.output_format or "png"

    @property
    def linked(self) -> bool:
        """Whether images are answered as addresses: OpenAI's default of its dall-e models."""
        if self.response_format is None and (self.model or "").startswith("dall-e"):
            return not self.stream and self.format == "png"
        return self.response_format == "url"

    def to_image_request(self, client: str, steps: Mapping[str, int]) -> ImageRequest:
        """Converts the fields. steps: of each `quality` that is mapped to some."""
        optional: dict[str, Any] = {
            "negative_prompt": self.negative_prompt, "steps": self.steps,
            "guidance": self.guidance, "guidance_until": self.guidance_until,
            "guidance_rescale": self.guidance_rescale,
            "scheduler": self.scheduler, "fit": self.fit, "number": self.n, "seed": self.seed,
            "size": None if self.size == "auto" else self.size,
        }  # fmt: skip
        if self.steps is None:
            optional["steps"] = steps.get(self.quality or "auto")
        loras = tuple((each.name, each.scale) for each in self.lora or ())
        given = {name: value for name, value in optional.items() if value is not None}
        return ImageRequest(self.prompt, client=client, loras=loras, **given)


class EditRequest(GenerationRequest):
    """The fields of an edit, without its files."""

    strength: Number | None = None
    mask_blur: Whole | None = None
    mask_fill: str | None = None
    input_fidelity: Literal["high", "low"] | None = None


class VariationRequest(EditRequest):
    """The fields of a variation, without its file."""

    prompt: str = ""  # by default that of the image, if koala drew it
