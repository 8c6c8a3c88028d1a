"""The small CNN of one-shot data-free federated learning: DENSE (Zhang et al., NeurIPS 2022) and Co-Boosting (Dai et al., ICLR 2024)."""

from __future__ import annotations

from torch import nn

from fedimpr.models.architecture import Architecture, Shape


def cnn128(shape: Shape, classes: int) -> nn.Module:
    """Three unpadded 3x3 convolutions of 128 kernels, 2x2 max-pools after the first two, one linear layer (2048 -> K on 32x32).

    Without batch-norm. 319,242 parameters for 3x32x32 and ten classes.
    """
    channels, *sides = shape
    height, width = (((side - 2) // 2 - 2) // 2 - 2 for side in sides)
    return nn.Sequential(
        *(nn.Conv2d(channels, 128, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(128, 128, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(128 * height * width, classes),
    )


ARCHITECTURES = {"cnn128": Architecture(cnn128, least=18)}
