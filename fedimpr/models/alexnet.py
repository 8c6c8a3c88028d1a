"""The AlexNet for CIFAR-10 of ZSKD (Nayak et al., "Zero-shot knowledge distillation in deep networks", ICML 2019) and its half.

After the released code: ReLU, local response normalisation, pooling and batch-norm in this order; dropout at 0.5 before the batch-norms
of the fully connected layers. Initial weights are PyTorch's, not the released N(0, 0.01).
"""

from __future__ import annotations

from torch import nn

from fedimpr.models.architecture import Architecture, Shape


def alexnet(shape: Shape, classes: int) -> nn.Module:
    """48-128-192-192-128 kernels, 512 and 256 units: 1,659,178 parameters for 3x32x32 and ten classes."""
    return _alexnet(shape, classes, (48, 128, 192, 192, 128), (512, 256))


def alexnet_half(shape: Shape, classes: int) -> nn.Module:
    """24-64-96-96-64 kernels, 256 and 128 units: 417,434 parameters for 3x32x32 and ten classes."""
    return _alexnet(shape, classes, (24, 64, 96, 96, 64), (256, 128))


def _alexnet(shape: Shape, classes: int, kernels: tuple[int, int, int, int, int], units: tuple[int, int]) -> nn.Module:
    channels, height, width = shape
    for _ in range(3):
        height, width = (height - 1) // 2, (width - 1) // 2
    a, b, c, d, e = kernels
    f, g = units

    def conv(inputs: int, outputs: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.ReLU()]

    def full(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(outputs)]

    return nn.Sequential(
        *(*conv(channels, a, 5), _response_norm(), nn.MaxPool2d(3, 2), nn.BatchNorm2d(a)),
        *(*conv(a, b, 5), _response_norm(), nn.MaxPool2d(3, 2), nn.BatchNorm2d(b)),
        *(*conv(b, c, 3), nn.BatchNorm2d(c)),
        *(*conv(c, d, 3), nn.BatchNorm2d(d)),
        *(*conv(d, e, 3), nn.MaxPool2d(3, 2), nn.BatchNorm2d(e)),
        nn.Flatten(),
        *full(e * height * width, f),
        *full(f, g),
        nn.Linear(g, classes),
    )


def _response_norm() -> nn.Module:
    # TensorFlow, in which this was published, scales the sum over the five channels by alpha; PyTorch scales their mean.
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=1.0)


ARCHITECTURES = {"alexnet": Architecture(alexnet, least=15), "alexnet_half": Architecture(alexnet_half, least=15)}
