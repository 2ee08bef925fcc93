"""Samplers by the names that other programs give them."""

import re

from koala.generation import samplers
from koala.generation.samplers import LABELS, Sampler

# AUTOMATIC1111's further names of the samplers, ComfyUI's and diffusers'.
ALIASES = {
    "euler": ("k_euler", "EulerDiscreteScheduler"),
    "euler-a": ("k_euler_a", "k_euler_ancestral", "euler_a", "euler_ancestral",
                "EulerAncestralDiscreteScheduler"),
    "dpm++2m": ("k_dpmpp_2m", "dpmpp_2m", "DPMSolverMultistepScheduler"),
    "dpm++2m-sde": ("k_dpmpp_2m_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
    "dpm++sde": ("k_dpmpp_sde", "dpmpp_sde", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"),
    "unipc": ("uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"),
    "ddim": ("DDIMScheduler",),
    "lcm": ("k_lcm", "LCMScheduler"),
}  # fmt: skip
UNNAMED = ("auto", "automatic", "default", "none")  # the model's own
_KARRAS = ("karras", "ka", "k")  # at a name's end


def _bare(name: str) -> str:
    """A name without what programs write in different ways."""
    return re.sub(r"[\s_-]+", "", name.lower()).replace("dpmpp", "dpm++")


_KEYS = {
    _bare(name): key
    for key, sampler in samplers.SAMPLERS.items()
    for name in (key, sampler.name, f"k{key}", *ALIASES.get(key, ()))
}
_ENDINGS = {_bare(word): name for name in Sampler.spacings for word in (name, LABELS[name])}
_ENDINGS |= dict.fromkeys(_KARRAS, "karras")


def own_name(name: str) -> str | None:
    """Our name of a sampler, with its spacing where that is named; None for the model's own.

    An unknown name is returned as it is: `samplers.get` refuses it with a list of all.
    """
    bare = _bare(name)
    if bare in UNNAMED:
        return None
    if bare in _KEYS:
        return _KEYS[bare]
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        key = _KEYS.get(bare.removesuffix(ending)) if bare.endswith(ending) else None
        if key is not None:
            return f"{key}-{_ENDINGS[ending]}"
    return name
