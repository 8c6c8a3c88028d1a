"""VGG for small images (Simonyan and Zisserman, ICLR 2015), with batch-norm and one linear layer, as in CMI's experiments on CIFAR."""

from __future__ import annotations

from torch import nn

from fedimpr.models.architecture import Architecture, Shape
from fedimpr.models.pooling import MaxPool2x2
from fedimpr.models.resnet import GlobalMean


def vgg11(shape: Shape, classes: int) -> nn.Module:
    """Configuration A, four of its max-pools, then the mean over positions: 9,231,114 parameters for three channels and ten classes."""
    layers: list[nn.Module] = []
    inputs = shape[0]
    for stage, kernels in enumerate(((64,), (128,), (256, 256), (512, 512), (512, 512))):
        if stage > 0:
            layers.append(MaxPool2x2())
        for outputs in kernels:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers, GlobalMean(), nn.Linear(inputs, classes))


ARCHITECTURES = {"vgg11": Architecture(vgg11, least=16)}
