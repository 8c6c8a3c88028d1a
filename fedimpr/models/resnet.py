"""ResNets for small images (He et al., "Deep residual learning for image recognition", CVPR 2016).

The widths and depths of the ImageNet networks behind a 3x3 stem of stride 1 without max-pooling, as experiments on CIFAR use them (CMI,
DeepInversion).
"""

from __future__ import annotations

from torch import Tensor, nn

from fedimpr.models.architecture import Architecture, Shape


def resnet8(shape: Shape, classes: int, *, width: int, stride: int) -> nn.Module:
    """The least of the ResNets for CIFAR: a block in each of three stages, of 1, 2 and 4 times ``width`` kernels.

    ``stride`` is the first convolution's. Width 16 has 78,042 parameters for three channels and ten classes.
    """
    return _resnet(shape, classes, (1, 1, 1), width, stride)


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """Stages of 2, 2, 2, 2 blocks: 11,173,962 parameters for three channels and ten classes."""
    return _resnet(shape, classes, (2, 2, 2, 2), 64, 1)


def resnet34(shape: Shape, classes: int) -> nn.Module:
    """Stages of 3, 4, 6, 3 blocks: 21,282,122 parameters for three channels and ten classes."""
    return _resnet(shape, classes, (3, 4, 6, 3), 64, 1)


class GlobalMean(nn.Module):
    """The mean over all positions, (N, C, H, W) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        return x.mean((2, 3))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return out


def _resnet(shape: Shape, classes: int, depths: tuple[int, ...], width: int, stride: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, depth in enumerate(depths):
        outputs = width * 2**stage
        for block in range(depth):
            layers.append(_Block(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    return nn.Sequential(*layers, GlobalMean(), nn.Linear(inputs, classes))


ARCHITECTURES = {
    "resnet8": Architecture(resnet8, least=8),
    "resnet18": Architecture(resnet18, least=8),
    "resnet34": Architecture(resnet34, least=8),
}
