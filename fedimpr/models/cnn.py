"""Small CNNs of federated learning: that of one-shot data-free methods, and that of simulators' benchmarks."""

from __future__ import annotations

from torch import nn

from fedimpr.models.architecture import Architecture, Shape
from fedimpr.models.pooling import MaxPool2x2


def cnn128(shape: Shape, classes: int) -> nn.Module:
    """The network of DENSE (Zhang et al., NeurIPS 2022) and Co-Boosting (Dai et al., ICLR 2024).

    Three unpadded 3x3 convolutions of 128 kernels, 2x2 max-pools after the first two, one linear layer (2048 -> K on 32x32).
    Without batch-norm. 319,242 parameters for 3x32x32 and ten classes.
    """
    channels, *sides = shape
    height, width = (((side - 2) // 2 - 2) // 2 - 2 for side in sides)
    return nn.Sequential(
        *(nn.Conv2d(channels, 128, 3), nn.ReLU(), MaxPool2x2()),
        *(nn.Conv2d(128, 128, 3), nn.ReLU(), MaxPool2x2()),
        *(nn.Conv2d(128, 128, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(128 * height * width, classes),
    )


def cnn_dropout(shape: Shape, classes: int) -> nn.Module:
    """The network of pfl's benchmark (Granqvist et al., NeurIPS 2024), after adaptive federated optimisation (Reddi et al., ICLR 2021).

    Two unpadded 3x3 convolutions of 32 and 64 kernels, a 2x2 max-pool, 128 hidden units, dropout of 1/4 and 1/2 before and after them.
    Without batch-norm. 1,626,442 parameters for 3x32x32 and ten classes.
    """
    channels, height, width = shape
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(MaxPool2x2(), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(128, classes),
    )


ARCHITECTURES = {"cnn128": Architecture(cnn128, least=18), "cnn_dropout": Architecture(cnn_dropout, least=6)}
