"""The fields of AUTOMATIC1111's API: what each does here, or which of its values may be said.

Its tools send some fifty fields, whether they mean them or not. Those that can have no effect here
are taken at the values that tools always send, and refused by name at any other. Fields that
belong to something that is switched off, as `hr_scale` does to `enable_hr`, may say anything: so
they do in AUTOMATIC1111's.
"""

import re
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict

from koala.generation import samplers
from koala.generation.validation import lora_scale
from koala.serving.errors import Refusal
from koala.serving.image_request import Order
from koala.serving.uploads import from_text

OFF: tuple[Any, ...] = (None, False, "", [], {})  # equals 0, too
ANY_BOOL = (None, False, True)
# Without an effect here, and the values that they may have.
FIXED: dict[str, tuple[Any, ...]] = {
    "alwayson_scripts": OFF,
    "clip_skip": (None, 1, 2),
    "comments": OFF,
    "disable_extra_networks": OFF,
    "do_not_save_grid": ANY_BOOL,  # there are no grids
    "enable_hr": OFF,
    "eta": (None, 1, 0),  # what "Euler a" and "DDIM" are made with
    "firstpass_image": OFF,
    "force_task_id": OFF,
    "infotext": OFF,
    "override_settings_restore_afterwards": ANY_BOOL,  # they change nothing
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
FIXED_OF_PICTURES: dict[str, tuple[Any, ...]] = {
    "image_cfg_scale": (None, 0, 1.5),
    "initial_noise_multiplier": (None, 0, 1),
    "latent_mask": OFF,
    "resize_mode": (None, 0),
}
FIXED_OF_MASKS: dict[str, tuple[Any, ...]] = {
    "inpaint_full_res": ANY_BOOL,  # the whole picture is drawn in either case
    "inpaint_full_res_padding": (None, 0, 32),
    "inpainting_fill": (None, 0, 1),  # from the original in either case
    "mask_blur": (None, 0, 4),
    "mask_blur_x": (None, 0, 4),
    "mask_blur_y": (None, 0, 4),
    "mask_round": (None, True),
}
# Parts of something that only `FIXED` could switch on.
IDLE = ("hr_", "firstphase_", "refiner_switch_at", "script_args", "subseed")
# Options, with the values that are true of this server; the first is told.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (2, 1),  # SDXL's text encoders always stop at the last but one
    "eta_noise_seed_delta": (0,),
    "return_grid": (False,),
    "samples_format": ("png",),
    "sd_vae": ("Automatic", "None", None),
}
SCHEDULES = ("Automatic", "SGM Uniform")
_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]+))?>")
_OTHER = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")


class Asked(BaseModel):
    """What txt2img and img2img share. Fields that are not here are looked up in the tables."""

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
        """The fields without an effect, with their values."""
        return FIXED

    def idle(self, name: str) -> bool:
        """Whether a field belongs to what is switched off."""
        return name.startswith(IDLE) or name == "denoising_strength"

    def check(self, model: str) -> None:
        """Refuses whatever would be ignored, by its name."""
        fixed = self.fixed()
        for name, value in (self.model_extra or {}).items():
            if name not in fixed and not self.idle(name):
                raise Refusal(400, f"there is no field {name!r} here", "unknown_parameter", name)
            if name in fixed and value not in fixed[name]:
                raise _without_effect(name, value, fixed[name])
        if self.eta_of_another():
            raise _without_effect("eta", 0, (None, 1))
        check_options(self.override_settings or {}, model)

    def eta_of_another(self) -> bool:
        """ "Euler a" adds all of its noise: eta 0 would be another sampler."""
        eta = (self.model_extra or {}).get("eta")
        return eta is not None and eta == 0 and self.sampler() == "euler-a"

    def sampler(self) -> str:
        """Koala's name of the sampler. Refusal for one that is not there."""
        asked = self.sampler_name or self.sampler_index or "Euler"
        names = {sampler.name: name for name, sampler in samplers.SAMPLERS.items()}
        found = names.get(asked, asked)
        if found not in samplers.SAMPLERS:
            raise Refusal(
                400, f"sampler {asked!r} is not there: allowed are {', '.join(names)}",
                "invalid_value", "sampler_name" if self.sampler_name else "sampler_index",
            )  # fmt: skip
        spaced = ("", *(SCHEDULES if found != "lcm" else SCHEDULES[:1]))
        if (self.scheduler or "") not in spaced:
            raise Refusal(
                400, f"scheduler {self.scheduler!r} does not go with {asked}: allowed are "
                f"{', '.join(spaced[1:])}", "invalid_value", "scheduler",
            )  # fmt: skip
        return found

    def order(self, client: str) -> Order:
        """The same for the service. What is left out is as in `koala generate`."""
        prompt, loras = with_loras(self.prompt)
        if (self.width is None) != (self.height is None):
            raise Refusal(400, "give width and height, or neither", "invalid_value", "width")
        seed = None if self.seed is None or self.seed == -1 else self.seed
        for name, value in (("batch_size", self.batch_size), ("n_iter", self.n_iter)):
            if value < 1:
                raise Refusal(400, f"{name} is {value}: at least 1", "invalid_value", name)
        given: dict[str, Any] = {"steps": self.steps, "guidance": self.cfg_scale}
        return Order(
            prompt,
            negative_prompt=self.negative_prompt or "",
            scheduler=self.sampler(),
            size=None if self.width is None else f"{self.width}x{self.height}",
            number=self.batch_size * self.n_iter,
            seed=seed,
            loras=loras,
            client=client,
            **{name: value for name, value in given.items() if value is not None},
        )


class FromText(Asked):
    """The fields of txt2img."""


class FromPicture(Asked):
    """The fields of img2img."""

    init_images: list[str]
    mask: str | None = None
    denoising_strength: float | None = None
    inpainting_mask_invert: bool | None = None
    include_init_images: bool | None = None

    def fixed(self) -> Mapping[str, tuple[Any, ...]]:
        return {**FIXED, **FIXED_OF_PICTURES, **(FIXED_OF_MASKS if self.mask else {})}

    def idle(self, name: str) -> bool:
        return name.startswith(IDLE) or (not self.mask and name in FIXED_OF_MASKS)

    def given(self) -> dict[str, Any]:
        """The order's picture, mask and strength, as bytes and a number."""
        if len(self.init_images) != 1:
            raise Refusal(
                400, f"init_images holds {len(self.init_images)}: give one picture",
                "invalid_value", "init_images",
            )  # fmt: skip
        return {
            "image": from_text(self.init_images[0], "init_images"),
            "mask": None if not self.mask else from_text(self.mask, "mask"),
            "strength": self.denoising_strength,
        }


def with_loras(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The prompt without its <lora:NAME:SCALE>, and what they say. Refusal for other kinds."""
    loras = []
    for name, scale in _LORA.findall(prompt):
        try:
            loras.append((name, lora_scale(float(scale or 1))))
        except ValueError:
            raise Refusal(
                400, f"<lora:{name}:{scale}>: the scale is no number", "invalid_value", "prompt"
            ) from None
    left = _LORA.sub("", prompt)
    if other := _OTHER.search(left):
        raise Refusal(
            400, f"{other[0]} cannot be used: allowed is <lora:NAME:SCALE>", "invalid_value",
            "prompt",
        )  # fmt: skip
    return (left.strip() if loras else prompt), tuple(loras)


def check_options(options: Mapping[str, Any], model: str) -> None:
    """Refuses options that this server does not have, or has otherwise."""
    allowed = {**OPTIONS, "sd_model_checkpoint": (model, None)}
    for name, value in options.items():
        if name not in allowed:
            raise Refusal(
                400, f"option {name!r} is not there: allowed are {', '.join(sorted(allowed))}",
                "unknown_parameter", name,
            )  # fmt: skip
        if value not in allowed[name]:
            raise _without_effect(name, value, allowed[name])


def inverted(mask: Image.Image) -> Image.Image:
    """A mask that has dark what the other has light."""
    return ImageOps.invert(mask.convert("L"))


def _without_effect(name: str, value: object, allowed: tuple[Any, ...]) -> Refusal:
    said = ", ".join(sorted({repr(each) for each in allowed if each is not None}))
    return Refusal(
        400, f"{name} {value!r} would have no effect here: leave it out, or say {said}",
        "invalid_value", name,
    )  # fmt: skip
