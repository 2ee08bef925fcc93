"""Makes a teacher of a student: the larger U-Net that computes exactly what its cut does.

The inverse of `koala.checkpoints.compress`. Blocks that the cut has are copied; each new one adds
zero to the residual stream, so training goes on where the cut's ended (as in Net2Net,
arXiv 1511.05641).
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from koala.architectures.block_map import tensor_map
from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.table import UNetArchitecture

# The last layer of a new resnet or transformer, and of each part of a new block in an old one.
_LAST, _LAST_OF_BLOCK = ("conv2", "proj_out"), ("to_out.0", "ff.net.2")


@torch.no_grad()
def grow(cut: UNet2DConditionModel, to: UNetArchitecture) -> UNet2DConditionModel:
    """A new U-Net `to` in fp32 whose output equals `cut`'s, up to rounding.

    New inner weights are random (torch's global generator), so that they differ and can learn.
    UserError if `cut` is not a cut of `to` (`tensor_map`).
    """
    names = tensor_map(to, from_unet_config(cut.config))
    unet = UNet2DConditionModel(**unet_config(to))
    weights, inherited = unet.state_dict(), cut.state_dict()
    known = set(names.values())
    for name in sorted(weights.keys() - known):
        module = name.rpartition(".")[0]
        transformer = name.partition(".transformer_blocks")[0]
        of_old = f"{transformer}.proj_out.weight" in known
        if module.endswith((*_LAST, "conv_shortcut", *(_LAST_OF_BLOCK if of_old else ()))):
            weights[name].zero_()
        if name.endswith("conv_shortcut.weight"):  # of a new up resnet: drops the new skip
            out = weights[name].shape[0]
            weights[name][:, :out, 0, 0] = torch.eye(out)
    for mine, theirs in names.items():
        weights[theirs].copy_(inherited[mine])
    return unet
