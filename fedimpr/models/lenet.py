"""LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 1998) and its half.

With ReLU, max-pooling and full connections between the layers, as data-free distillation uses it (ZSKD, Nayak et al., ICML 2019):
LeNet-5 teaches a LeNet-5-half, which has half the kernels of the convolutions and the same full connections.

Its 5x5 convolutions were made for 32x32 pixels. Smaller images are given by zero padding what they lack: two pixels around the first
convolution below 32x32 (so 28x28 is seen as 32x32), and two around the second as well below 16x16.
"""

from __future__ import annotations

from torch import nn

from fedimpr.models.architecture import Architecture, Shape
from fedimpr.models.pooling import MaxPool2x2


def lenet5(shape: Shape, classes: int, *, batch_norm: bool) -> nn.Module:
    """6 and 16 kernels, 120 and 84 units: 61,706 parameters for 1x28x28 and ten classes. ``batch_norm`` follows each convolution."""
    return _lenet(shape, classes, (6, 16, 120, 84), batch_norm)


def lenet5_half(shape: Shape, classes: int, *, batch_norm: bool) -> nn.Module:
    """3 and 8 kernels, 120 and 84 units: 35,820 parameters for 1x28x28 and ten classes, as ZSKD has it."""
    return _lenet(shape, classes, (3, 8, 120, 84), batch_norm)


def _lenet(shape: Shape, classes: int, widths: tuple[int, int, int, int], batch_norm: bool) -> nn.Module:
    channels, *sides = shape
    first, second = 2 * (min(sides) < 32), 2 * (min(sides) < 16)
    height, width = (((side + 2 * first - 4) // 2 + 2 * second - 4) // 2 for side in sides)
    a, b, c, d = widths

    def block(inputs: int, outputs: int, padding: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
        return [nn.Conv2d(inputs, outputs, 5, padding=padding), *norm, nn.ReLU(), MaxPool2x2()]

    return nn.Sequential(
        *block(channels, a, first),
        *block(a, b, second),
        nn.Flatten(),
        *(nn.Linear(b * height * width, c), nn.ReLU()),
        *(nn.Linear(c, d), nn.ReLU()),
        nn.Linear(d, classes),
    )


ARCHITECTURES = {"lenet5": Architecture(lenet5, least=4), "lenet5_half": Architecture(lenet5_half, least=4)}
