"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016), with the pairs that CMI and its followers distil between.

``wrn<depth>_<width>``: (depth - 4) / 6 blocks in each of three stages, of 16, 32 and 64 kernels times the width. Without dropout.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fedimpr.models.architecture import Architecture, Shape
from fedimpr.models.resnet import GlobalMean


def wrn40_2(shape: Shape, classes: int) -> nn.Module:
    """2,243,546 parameters for three channels and ten classes."""
    return _wide_resnet(shape, classes, depth=40, width=2)


def wrn40_1(shape: Shape, classes: int) -> nn.Module:
    """563,930 parameters for three channels and ten classes."""
    return _wide_resnet(shape, classes, depth=40, width=1)


def wrn16_2(shape: Shape, classes: int) -> nn.Module:
    """691,674 parameters for three channels and ten classes."""
    return _wide_resnet(shape, classes, depth=16, width=2)


def wrn16_1(shape: Shape, classes: int) -> nn.Module:
    """175,066 parameters for three channels and ten classes."""
    return _wide_resnet(shape, classes, depth=16, width=1)


class _Block(nn.Module):
    """Batch-norm and ReLU come before each convolution; where the width changes, the shortcut starts behind the first of them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        out: Tensor = self.residual(z) + (x if self.shortcut is None else self.shortcut(z))
        return out


def _wide_resnet(shape: Shape, classes: int, *, depth: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)]
    inputs = 16
    for stage in range(3):
        outputs = 16 * width * 2**stage
        for block in range((depth - 4) // 6):
            layers.append(_Block(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    network = nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(), GlobalMean(), nn.Linear(inputs, classes))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels)))
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return network


ARCHITECTURES = {make.__name__: Architecture(make, least=4) for make in (wrn40_2, wrn40_1, wrn16_2, wrn16_1)}
