"""diffusers' schedulers of our samplers' names, with the same settings."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

NOISY = {"euler-a", "dpm++2m-sde", "lcm"}  # whose `step` takes a generator
PRECEDED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_KINDS = {  # DDIM's last step leads to no noise, and nothing is clipped
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "lcm": (LCMScheduler, {}),
}
_SPACINGS = {
    "uniform": {"timestep_spacing": "linspace"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
}
# Those that a scheduler of diffusers has: its ancestral one knows no other noise levels, and the
# "linspace" of its multistep ones leaves out the last timestep.
SPACED = [
    *(f"{name}-{spacing}" for name in ("euler", "dpm++sde") for spacing in _SPACINGS),
    *(
        f"{name}-{spacing}"
        for name in ("dpm++2m", "dpm++2m-sde", "unipc")
        for spacing in ("karras", "exponential", "beta")
    ),
    "euler-a-uniform",
]


def their_scheduler(name, config, generator=None):
    """The scheduler of one of our names, for a folder's scheduler config.

    generator: that of the noise of a scheduler which would draw it from another source.
    """
    spacing = next((ending for ending in _SPACINGS if name.endswith(f"-{ending}")), "")
    key = name.removesuffix(f"-{spacing}")
    kept = (*PRECEDED, "prediction_type", "rescale_betas_zero_snr")
    settings = {key: config[key] for key in kept if config.get(key)}
    settings |= _SPACINGS.get(spacing, {"timestep_spacing": "trailing"})
    if key == "dpm++sde":
        return _sde(settings, generator)
    kind, own = _KINDS[key]
    if kind is LCMScheduler:
        del settings["timestep_spacing"]
    return kind(**settings, **own)


def _sde(settings, generator):
    pytest.importorskip("torchsde", reason="diffusers' DPM++ SDE imports torchsde")
    from diffusers import DPMSolverSDEScheduler

    class Drawn(DPMSolverSDEScheduler):
        """Its noise is a Brownian motion with a generator's increments."""

        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            path: dict[float, torch.Tensor] = {}

            def noise(sigma, to):
                sigma, to = float(sigma), float(to)
                if sigma not in path:
                    path.clear()
                    path[sigma] = 0.0
                lowest = min(path)
                drawn = torch.randn(self.shape, generator=generator)
                path[to] = path[lowest] + math.sqrt(lowest - to) * drawn
                return (path[to] - path[sigma]) / math.sqrt(sigma - to)

            self.noise_sampler = noise

        def step(self, output, timestep, sample, **kwargs):
            self.shape = sample.shape
            return super().step(output, timestep, sample, **kwargs)

    zero_snr = settings.pop("rescale_betas_zero_snr", False)
    made = Drawn(**settings)
    if zero_snr:  # a setting that it lacks
        other = EulerDiscreteScheduler(**settings, rescale_betas_zero_snr=True)
        made.alphas_cumprod = other.alphas_cumprod
    return made
