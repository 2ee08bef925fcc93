"""The fields of AUTOMATIC1111's API as requests for images.

What it has and this server lacks is in `a1111_accepted`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from PIL import Image, ImageFilter, ImageOps
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from koala.errors import UserError
from koala.generation import samplers
from koala.generation.image_files import as_grey
from koala.generation.samplers import Sampler
from koala.serving.api import a1111_accepted as accepted
from koala.serving.api.a1111_second_pass import SecondPass
from koala.serving.api.values import Number, Whole, told
from koala.serving.errors import ApiError
from koala.serving.image_request import ImageRequest
from koala.serving.sampler_names import UNNAMED, own_name
from koala.serving.uploads import decode_base64

# Our spacings by AUTOMATIC1111's names of its schedules; "" is the sampler's own.
SCHEDULES = {
    "automatic": "",
    "sgm_uniform": "trailing",
    **{name.replace("-", "_"): name for name in Sampler.spacings if name != "trailing"},
}
# Of the same noise levels.
OTHER_SCHEDULES = {"polyexponential": "exponential", "normal": "uniform", "simple": "trailing"}
FILLS = ("surroundings", "original", "noise", "nothing")  # by the numbers of "inpainting_fill"
NOISY = ("euler-a", "dpm++2m-sde", "dpm++sde")  # samplers that "eta" concerns


class A1111Request(BaseModel):
    """The fields of txt2img and img2img. Others are looked up in `a1111_accepted`."""

    model_config = ConfigDict(extra="allow")
    prompt: str = ""
    negative_prompt: str | None = None
    seed: Whole | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    steps: Whole | None = None
    cfg_scale: Number | None = None
    width: Whole | None = None
    height: Whole | None = None
    batch_size: Whole = 1
    n_iter: Whole = 1
    do_not_save_samples: bool | None = None
    send_images: bool | None = None
    override_settings: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _tidied(cls, given: Any) -> Any:
        """Without what is null or empty, and as its own scripts say."""
        if not isinstance(given, dict):
            return given
        values = accepted.with_own_scripts(told(given))
        if values.get("prompt") is None:
            values.pop("prompt", None)
        for name in [name for name in accepted.OBJECTS if values.get(name) == []]:
            del values[name]  # as PHP writes an object without fields
        return {
            name: value if name in cls.model_fields else accepted.plain_switch(name, value)
            for name, value in values.items()
        }

    def harmless(self) -> Mapping[str, tuple[Any, ...]]:
        """The fields that are ignored, with the values at which nobody need be told."""
        return accepted.HARMLESS

    def inactive(self, name: str) -> bool:
        """Whether a field belongs to a feature that is off."""
        return name.startswith("hr_") or name == "denoising_strength"

    def check(self, model: str) -> list[str]:
        """The names of the fields that are ignored. ApiError for a feature that is missing."""
        given = {
            name: value
            for name, value in (self.model_extra or {}).items()
            if not self.inactive(name)
        }
        accepted.refuse_lacking(given | {"resize_mode": getattr(self, "resize_mode", 0)})
        if given.get("eta") == 0 and (self.sampler() or "").startswith(NOISY):
            raise accepted.without_effect("eta", 0, (None, 1))  # it would be another sampler
        options = accepted.ignored_options(self.override_settings or {}, model)
        return sorted({*accepted.ignored(given, self.harmless()), *options})

    def sampler(self) -> str | None:
        """Our name of sampler and schedule; None if neither is named: the model's own.

        ApiError for unknown ones, or two that differ.
        """
        wanted = self.sampler_name or self.sampler_index
        name = (self.scheduler or "automatic").strip().lower().replace(" ", "_")
        name = "automatic" if name in UNNAMED else name
        wanted = own_name(wanted or "automatic")
        if wanted is None and name == "automatic":
            return None
        wanted = wanted or "euler"
        try:
            kind, named = samplers.get(wanted)
        except UserError as error:
            raise ApiError(
                400, str(error), "invalid_value",
                "sampler_name" if self.sampler_name else "sampler_index",
            ) from None  # fmt: skip
        asked = (SCHEDULES | OTHER_SCHEDULES).get(name)
        spacing = asked or named
        fits = spacing in kind.spacings and named in (spacing, kind.spacing)
        if asked is None or not fits:
            names = ["automatic", *(n for n, own in SCHEDULES.items() if own in kind.spacings)]
            raise ApiError(
                400, f"scheduler {self.scheduler!r} does not work with {kind.name}: allowed are "
                f"{', '.join(names)}", "invalid_value", "scheduler",
            )  # fmt: skip
        key = next(key for key, one in samplers.SAMPLERS.items() if one is kind)
        return key if spacing == kind.spacing else f"{key}-{spacing}"

    def to_image_request(self, client: str) -> ImageRequest:
        """Converts the fields. Defaults are those of `koala generate`. ApiError."""
        if (self.width is None) != (self.height is None):
            raise ApiError(400, "give width and height, or neither", "invalid_value", "width")
        seed = None if self.seed is None or self.seed == -1 else self.seed
        for name, value in (("batch_size", self.batch_size), ("n_iter", self.n_iter)):
            if value < 1:
                raise ApiError(400, f"{name} is {value}: at least 1", "invalid_value", name)
        optional: dict[str, Any] = {"steps": self.steps, "guidance": self.cfg_scale}
        return ImageRequest(
            self.prompt,
            negative_prompt=self.negative_prompt or "",
            scheduler=self.sampler(),
            size=None if self.width is None else f"{self.width}x{self.height}",
            number=self.batch_size * self.n_iter,
            seed=seed,
            client=client,
            **{name: value for name, value in optional.items() if value is not None},
        )


class Txt2ImgRequest(A1111Request):
    """The fields of txt2img."""

    def inactive(self, name: str) -> bool:
        return super().inactive(name) or name == "enable_hr"

    def check(self, model: str) -> list[str]:
        second, given = self.second_pass(), self.model_extra or {}
        return [*super().check(model), *(second.ignored(given) if second else ())]

    def second_pass(self) -> SecondPass | None:
        """What to do with the images that are drawn, if anything."""
        return SecondPass.of(self.model_extra or {})


def _as_list(given: object) -> object:
    """A list of one image for the image alone."""
    return [given] if isinstance(given, str) else given


class Img2ImgRequest(A1111Request):
    """The fields of img2img."""

    init_images: Annotated[list[str], BeforeValidator(_as_list)]
    mask: str | None = None
    mask_blur: Whole | None = None
    inpainting_fill: Whole | None = None
    denoising_strength: Number | None = None
    inpainting_mask_invert: bool | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: Annotated[Whole, Field(ge=0, le=4096)] | None = None
    include_init_images: bool | None = None
    resize_mode: Whole | None = None

    def harmless(self) -> Mapping[str, tuple[Any, ...]]:
        masks = accepted.HARMLESS_MASK if self.mask else {}
        return {**accepted.HARMLESS, **accepted.HARMLESS_IMG2IMG, **masks}

    def inactive(self, name: str) -> bool:
        return name.startswith("hr_") or (not self.mask and name in accepted.HARMLESS_MASK)

    def fill(self) -> str | None:
        """What the masked part starts from; None where that has no effect. ApiError."""
        if not self.mask or self.inpainting_fill is None or self.denoising_strength == 1:
            return None
        if self.inpainting_fill not in range(len(FILLS)):
            raise ApiError(
                400, f"inpainting_fill is {self.inpainting_fill}: allowed are 0 to "
                f"{len(FILLS) - 1}", "invalid_value", "inpainting_fill",
            )  # fmt: skip
        return FILLS[self.inpainting_fill]

    @property
    def only_masked(self) -> bool:
        """Whether the masked part alone is to be drawn."""
        return bool(self.mask and self.inpaint_full_res)

    def images(self) -> dict[str, Any]:
        """The image, mask and strength of the request. ApiError, UserError."""
        if len(self.init_images) != 1:
            raise ApiError(
                400, f"init_images has {len(self.init_images)} images: give one",
                "invalid_value", "init_images",
            )  # fmt: skip
        return {
            "image": decode_base64(self.init_images[0], "init_images"),
            "mask": None if not self.mask else decode_base64(self.mask, "mask"),
            "strength": self.denoising_strength,
            "mask_blur": self.mask_blur if self.mask else None,  # belongs to the mask
            "mask_fill": self.fill(),
        }


def inverted(mask: Image.Image) -> Image.Image:
    """The mask with what is repainted and what is kept swapped."""
    return ImageOps.invert(as_grey(mask))


def framed(image: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    """The image at `size` in one of the modes: 0 stretched, 1 cropped, 2 with blurred borders."""
    if mode == 0:
        return image.resize(size, Image.Resampling.LANCZOS)
    cropped = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if mode == 1:
        return cropped
    ground = cropped.filter(ImageFilter.GaussianBlur(max(size) / 16))
    inner = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
    ground.paste(inner, ((size[0] - inner.width) // 2, (size[1] - inner.height) // 2))
    return ground
