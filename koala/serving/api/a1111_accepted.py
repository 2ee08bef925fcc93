"""Which fields of AUTOMATIC1111's API this server lacks, and which it can do without.

Its tools send about fifty fields with every request, and some that it never had. A feature that
would change the image and is missing here is accepted switched off, and refused by name at any
other value. All else without effect is ignored, and named in the answer's `info`. Fields of a
feature that is off, such as `hr_scale` to `enable_hr`, are not looked at, as in AUTOMATIC1111's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from koala.serving.api.values import plain, shown
from koala.serving.errors import ApiError

OFF: tuple[Any, ...] = (None, False, "", [], {})  # also matches 0
ANY_BOOL = (None, False, True)
OBJECTS = ("alwayson_scripts", "override_settings")
# Features that are missing here, with the values at which they are off.
LACKING: dict[str, tuple[Any, ...]] = {
    "disable_extra_networks": OFF,
    "enable_hr": OFF,
    "eta": (None, 1, 0),  # the values "Euler a" and "DDIM" use
    "firstpass_image": OFF,
    "image_cfg_scale": (None, 0, 1.5),
    "infotext": OFF,
    "latent_mask": OFF,
    "refiner_checkpoint": (*OFF, "None"),
    "resize_mode": (None, 0, 1, 2),
    "restore_faces": OFF,
    "s_churn": OFF,
    "s_min_uncond": OFF,
    "s_noise": (None, 1),
    "s_tmax": OFF,
    "s_tmin": OFF,
    "script_name": (*OFF, "None"),
    "seed_resize_from_h": (None, -1, 0),
    "seed_resize_from_w": (None, -1, 0),
    "styles": (*OFF, "None", ["None"], ["none"], [""]),
    "subseed_strength": OFF,
    "tiling": OFF,
}
# Fields that are ignored, with the values at which nobody need be told.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "clip_skip": (None, 1, 2),  # SDXL always uses the last layer but one
    "comments": OFF,
    "do_not_save_grid": ANY_BOOL,  # no grids here
    "force_task_id": OFF,
    "override_settings_restore_afterwards": ANY_BOOL,  # overrides change nothing
    "save_images": ANY_BOOL,  # `do_not_save_samples` decides
    "use_deprecated_controlnet": OFF,
}
HARMLESS_IMG2IMG: dict[str, tuple[Any, ...]] = {"initial_noise_multiplier": (None, 0, 1)}
HARMLESS_MASK: dict[str, tuple[Any, ...]] = {
    "mask_blur_x": (None, 0, 4),
    "mask_blur_y": (None, 0, 4),
    "mask_round": (None, True),
}
SWITCHES = ("enable_hr", *LACKING, *HARMLESS, *HARMLESS_IMG2IMG, *HARMLESS_MASK)
# Prefixes of fields that belong to features in `LACKING`.
INACTIVE = ("firstphase_", "refiner_switch_at", "script_args", "subseed")
# Options with their accepted values; the first is reported.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (2, 1),
    "eta_noise_seed_delta": (0,),
    "return_grid": (False,),
    "samples_format": ("png",),
    "samples_save": (True,),
    "sd_vae": ("Automatic", "None", None),
}


def refuse_lacking(given: Mapping[str, Any]) -> None:
    """Raises ApiError for a feature that is on and missing here."""
    for name, allowed in LACKING.items():
        if name in given and given[name] not in allowed:
            raise without_effect(name, given[name], allowed)
    scripts = given.get("alwayson_scripts") or {}
    if not isinstance(scripts, dict):
        raise ApiError(
            400, f"alwayson_scripts is {shown(scripts)}: give an object, or leave it out",
            "invalid_value", "alwayson_scripts",
        )  # fmt: skip
    running = [name for name in scripts if not _is_off(scripts[name])]
    if running:
        raise ApiError(
            400, f"alwayson_scripts: {running[0]!r} is not here: leave it out, or switch it off",
            "invalid_value", "alwayson_scripts",
        )  # fmt: skip


def plain_switch(name: str, value: Any) -> Any:
    """The value of one of SWITCHES, with false for "false" and 0 for "0"."""
    return plain(value) if name in SWITCHES else value


def with_own_scripts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with those that the web UI's payloads hold in its own scripts, which come first.

    "Sampler" and "Seed"; they are left where they hold anything else.
    """
    scripts = given.get("alwayson_scripts")
    if not isinstance(scripts, dict):
        return dict(given)
    found, others = dict(given), dict(scripts)
    for name, script in scripts.items():
        match name, script:
            case "Sampler", {"args": [steps, sampler, scheduler]}:
                found |= {"steps": steps, "sampler_name": sampler, "scheduler": scheduler}
            case "Seed", {"args": [seed, False, *_]}:
                found["seed"] = seed
            case _:
                continue
        del others[name]
    return found | {"alwayson_scripts": others}


def _is_off(script: object) -> bool:
    """Whether a script's arguments switch it off, in the ways that ADetailer and ControlNet do."""
    arguments = script.get("args", []) if isinstance(script, dict) else script
    if isinstance(arguments, dict):
        arguments = [arguments]
    if not arguments or not isinstance(arguments, list):
        return not arguments
    if arguments[0] is False:
        return True
    arguments = [one for one in arguments if not isinstance(one, bool)]
    off = ({"enabled": False}, {"ad_model": "None"}, {"ad_tab_enable": False})
    return bool(arguments) and all(
        isinstance(one, dict) and any(switch.items() <= one.items() for switch in off)
        for one in arguments
    )


def ignored(given: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """The fields that have no effect: unknown ones, and `harmless` ones at an unusual value."""
    for name, value in given.items():
        known = name in LACKING or name == "alwayson_scripts" or name.startswith(INACTIVE)
        if not known and (name not in harmless or value not in harmless[name]):
            yield name


def ignored_options(options: Mapping[str, Any], model: str) -> list[str]:
    """The options that have no effect. ApiError for another model than the one that is served."""
    wanted = options.get("sd_model_checkpoint")
    if wanted not in (None, "", model):
        raise without_effect("sd_model_checkpoint", wanted, (model,))
    told = {"sd_model_checkpoint", "sd_checkpoint_hash"}
    return [
        name
        for name, value in options.items()
        if name not in told and value not in OPTIONS.get(name, ())
    ]


def without_effect(name: str, value: object, allowed: tuple[Any, ...]) -> ApiError:
    """The refusal of a field's value."""
    values = ", ".join(sorted({repr(each) for each in allowed if each is not None}))
    return ApiError(
        400, f"{name} {shown(value)} has no effect here: leave it out, or send {values}",
        "invalid_value", name,
    )  # fmt: skip
