"""The fields of AUTOMATIC1111's API: what each does here, or which values are accepted.

Its tools send about fifty fields with every request. A field without effect here is accepted at
the values that tools send by default, and rejected by name at any other. Fields that belong to a
feature that is off, such as `hr_scale` to `enable_hr`, accept any value, as in AUTOMATIC1111's.
"""

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict

from koala.generation import samplers
from koala.generation.image_files import as_grey
from koala.serving.errors import ApiError
from koala.serving.image_request import ImageRequest
from koala.serving.uploads import decode_base64

OFF: tuple[Any, ...] = (None, False, "", [], {})  # also matches 0
ANY_BOOL = (None, False, True)
# Fields without effect, with their accepted values.
FIXED: dict[str, tuple[Any, ...]] = {
    "alwayson_scripts": OFF,
    "clip_skip": (None, 1, 2),
    "comments": OFF,
    "disable_extra_networks": OFF,
    "do_not_save_grid": ANY_BOOL,  # no grids here
    "enable_hr": OFF,
    "eta": (None, 1, 0),  # the values "Euler a" and "DDIM" use
    "firstpass_image": OFF,
    "force_task_id": OFF,
    "infotext": OFF,
    "override_settings_restore_afterwards": ANY_BOOL,  # overrides change nothing
    "refiner_checkpoint": (*OFF, "None"),
    "restore_faces": OFF,
    "s_churn": OFF,
    "s_min_uncond": OFF,
    "s_noise": (None, 1),
    "s_tmax": OFF,
    "s_tmin": OFF,
    "save_images": ANY_BOOL,  # `do_not_save_samples` decides
    "script_name": (*OFF, "None"),
    "seed_resize_from_h": (None, -1, 0),
    "seed_resize_from_w": (None, -1, 0),
    "styles": OFF,
    "subseed_strength": OFF,
    "tiling": OFF,
    "use_deprecated_controlnet": OFF,
}
FIXED_IMG2IMG: dict[str, tuple[Any, ...]] = {
    "image_cfg_scale": (None, 0, 1.5),
    "initial_noise_multiplier": (None, 0, 1),
    "latent_mask": OFF,
    "resize_mode": (None, 0),
}
FIXED_MASK: dict[str, tuple[Any, ...]] = {
    "inpaint_full_res": ANY_BOOL,  # the whole image is always generated
    "inpaint_full_res_padding": (None, 0, 32),
    "inpainting_fill": (None, 0, 1),  # always starts from the original
    "mask_blur_x": (None, 0, 4),
    "mask_blur_y": (None, 0, 4),
    "mask_round": (None, True),
}
# Prefixes of fields that belong to features listed in `FIXED`.
INACTIVE = ("hr_", "firstphase_", "refiner_switch_at", "script_args", "subseed")
# Options with their accepted values; the first is reported.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (2, 1),  # SDXL always uses the last layer but one
    "eta_noise_seed_delta": (0,),
    "return_grid": (False,),
    "samples_format": ("png",),
    "sd_vae": ("Automatic", "None", None),
}
SCHEDULES = ("Automatic", "SGM Uniform")


class A1111Request(BaseModel):
    """The fields of txt2img and img2img. Others are looked up in the tables above."""

    model_config = ConfigDict(extra="allow")
    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    do_not_save_samples: bool | None = None
    send_images: bool | None = None
    override_settings: dict[str, Any] | None = None

    def fixed(self) -> Mapping[str, tuple[Any, ...]]:
        """The fields without effect, with their accepted values."""
        return FIXED

    def inactive(self, name: str) -> bool:
        """Whether a field belongs to a feature that is off."""
        return name.startswith(INACTIVE) or name == "denoising_strength"

    def check(self, model: str) -> None:
        """Raises ApiError for a field or value that would be ignored."""
        fixed = self.fixed()
        for name, value in (self.model_extra or {}).items():
            if name not in fixed and not self.inactive(name):
                raise ApiError(400, f"unknown field {name!r}", "unknown_parameter", name)
            if name in fixed and value not in fixed[name]:
                raise _without_effect(name, value, fixed[name])
        if self._eta_conflicts():
            raise _without_effect("eta", 0, (None, 1))
        check_options(self.override_settings or {}, model)

    def _eta_conflicts(self) -> bool:
        """Whether eta is 0 for "Euler a", which would make it another sampler."""
        eta = (self.model_extra or {}).get("eta")
        return eta is not None and eta == 0 and self.sampler() == "euler-a"

    def sampler(self) -> str:
        """Our name of the sampler. ApiError for an unknown one."""
        wanted = self.sampler_name or self.sampler_index or "Euler"
        names = {sampler.name: name for name, sampler in samplers.SAMPLERS.items()}
        found = names.get(wanted, wanted)
        if found not in samplers.SAMPLERS:
            raise ApiError(
                400, f"unknown sampler {wanted!r}: allowed are {', '.join(names)}",
                "invalid_value", "sampler_name" if self.sampler_name else "sampler_index",
            )  # fmt: skip
        schedules = ("", *(SCHEDULES if found != "lcm" else SCHEDULES[:1]))
        if (self.scheduler or "") not in schedules:
            raise ApiError(
                400, f"scheduler {self.scheduler!r} does not work with {wanted}: allowed are "
                f"{', '.join(schedules[1:])}", "invalid_value", "scheduler",
            )  # fmt: skip
        return found

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


class Img2ImgRequest(A1111Request):
    """The fields of img2img."""

    init_images: list[str]
    mask: str | None = None
    mask_blur: int | None = None
    denoising_strength: float | None = None
    inpainting_mask_invert: bool | None = None
    include_init_images: bool | None = None

    def fixed(self) -> Mapping[str, tuple[Any, ...]]:
        return {**FIXED, **FIXED_IMG2IMG, **(FIXED_MASK if self.mask else {})}

    def inactive(self, name: str) -> bool:
        return name.startswith(INACTIVE) or (not self.mask and name in FIXED_MASK)

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
        }


def check_options(options: Mapping[str, Any], model: str) -> None:
    """Raises ApiError for unknown options, and for values other than the current ones."""
    allowed = {**OPTIONS, "sd_model_checkpoint": (model, None)}
    for name, value in options.items():
        if name not in allowed:
            raise ApiError(
                400, f"unknown option {name!r}: allowed are {', '.join(sorted(allowed))}",
                "unknown_parameter", name,
            )  # fmt: skip
        if value not in allowed[name]:
            raise _without_effect(name, value, allowed[name])


def inverted(mask: Image.Image) -> Image.Image:
    """The mask with what is repainted and what is kept swapped."""
    return ImageOps.invert(as_grey(mask))


def _without_effect(name: str, value: object, allowed: tuple[Any, ...]) -> ApiError:
    values = ", ".join(sorted({repr(each) for each in allowed if each is not None}))
    return ApiError(
        400, f"{name} {value!r} has no effect here: leave it out, or send {values}",
        "invalid_value", name,
    )  # fmt: skip
