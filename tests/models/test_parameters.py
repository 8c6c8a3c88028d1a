"""The published sizes of the networks, layer by layer."""

from __future__ import annotations

import pytest

from fedimpr.models import build, names


def conv(size: int, inputs: int, outputs: int, bias: int = 1) -> int:
    return size * size * inputs * outputs + bias * outputs


def full(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def norm(*channels: int) -> int:
    return 2 * sum(channels)


def alexnet(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> int:
    # 32x32 after three 3x3 max-pools of stride 2: 15, 7, 3.
    convolutions = conv(5, 3, a) + conv(5, a, b) + conv(3, b, c) + conv(3, c, d) + conv(3, d, e)
    return convolutions + full(3 * 3 * e, f) + full(f, g) + full(g, 10) + norm(a, b, c, d, e, f, g)


def resnet(*depths: int, first: int = 64) -> int:
    total, inputs = conv(3, 3, first, 0) + norm(first), first
    for depth, width in zip(depths, (first, 2 * first, 4 * first, 8 * first), strict=False):
        total += conv(3, inputs, width, 0) + (2 * depth - 1) * conv(3, width, width, 0) + 2 * depth * norm(width)
        total += 0 if inputs == width else conv(1, inputs, width, 0) + norm(width)
        inputs = width
    return total + full(inputs, 10)


def wide_resnet(depth: int, k: int) -> int:
    blocks = (depth - 4) // 6
    total, inputs = conv(3, 3, 16, 0), 16
    for width in (16 * k, 32 * k, 64 * k):
        total += conv(3, inputs, width, 0) + (2 * blocks - 1) * conv(3, width, width, 0)
        total += norm(inputs) + (2 * blocks - 1) * norm(width)
        total += 0 if inputs == width else conv(1, inputs, width, 0)
        inputs = width
    return total + norm(inputs) + full(inputs, 10)


def vgg(*kernels: int) -> int:
    pairs = zip((3, *kernels), kernels, strict=False)
    return sum(conv(3, inputs, outputs) for inputs, outputs in pairs) + norm(*kernels) + full(512, 10)


LENET5 = conv(5, 1, 6) + conv(5, 6, 16) + full(16 * 5 * 5, 120) + full(120, 84) + full(84, 10)
LENET5_HALF = conv(5, 1, 3) + conv(5, 3, 8) + full(8 * 5 * 5, 120) + full(120, 84) + full(84, 10)

# name: (channels, side, options, count by layers, count as published)
PUBLISHED = {
    "lenet5": (1, 28, {"batch_norm": False}, LENET5, 61_706),
    "lenet5_half": (1, 28, {"batch_norm": False}, LENET5_HALF, 35_820),
    "cnn_dropout": (3, 32, {}, conv(3, 3, 32) + conv(3, 32, 64) + full(14 * 14 * 64, 128) + full(128, 10), 1_626_442),
    "cnn128": (3, 32, {}, conv(3, 3, 128) + 2 * conv(3, 128, 128) + full(2048, 10), 319_242),
    "alexnet": (3, 32, {}, alexnet(48, 128, 192, 192, 128, 512, 256), 1_659_178),
    "alexnet_half": (3, 32, {}, alexnet(24, 64, 96, 96, 64, 256, 128), 417_434),
    "resnet8": (3, 32, {"width": 16, "stride": 1}, resnet(1, 1, 1, first=16), 78_042),
    "resnet18": (3, 32, {}, resnet(2, 2, 2, 2), 11_173_962),
    "resnet34": (3, 32, {}, resnet(3, 4, 6, 3), 21_282_122),
    "wrn40_2": (3, 32, {}, wide_resnet(40, 2), 2_243_546),
    "wrn40_1": (3, 32, {}, wide_resnet(40, 1), 563_930),
    "wrn16_2": (3, 32, {}, wide_resnet(16, 2), 691_674),
    "wrn16_1": (3, 32, {}, wide_resnet(16, 1), 175_066),
    "vgg11": (3, 32, {}, vgg(64, 128, 256, 256, 512, 512, 512, 512), 9_231_114),
}


def test_every_network_is_in_the_table() -> None:
    assert set(PUBLISHED) == set(names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    channels, side, options, by_layers, published = PUBLISHED[name]
    model = build(name, shape=(channels, side, side), classes=10, mean=[0.5] * channels, std=[0.5] * channels, seed=0, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == by_layers == published


def test_batch_norm_adds_a_scale_and_a_shift_for_each_kernel() -> None:
    model = build("lenet5", shape=(1, 28, 28), classes=10, mean=[0.5], std=[0.5], seed=0, batch_norm=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 61_706 + norm(6, 16)


def test_lenet5_sees_28x28_as_the_32x32_of_its_paper() -> None:
    sizes = {side: build("lenet5", shape=(1, side, side), classes=10, mean=[0.5], std=[0.5], seed=0, batch_norm=False) for side in (28, 32)}
    assert [p.shape for p in sizes[28].parameters()] == [p.shape for p in sizes[32].parameters()]
