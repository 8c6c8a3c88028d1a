"""A student may start from the first units of its teacher's layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedimpr.errors import ConfigError
from fedimpr.models import build, inherit

MNIST = {"shape": (1, 28, 28), "classes": 10, "mean": [0.1], "std": [0.3]}
CIFAR10 = {"shape": (3, 32, 32), "classes": 10, "mean": [0.5] * 3, "std": [0.2] * 3}


def test_every_tensor_is_the_leading_block_of_its_namesake() -> None:
    larger, smaller = nn.Linear(3, 2), nn.Linear(2, 1)
    with torch.no_grad():
        larger.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        larger.bias.copy_(torch.tensor([7.0, 8.0]))
    inherit(smaller, larger)
    assert smaller.weight.tolist() == [[1.0, 2.0]] and smaller.bias.tolist() == [7.0]
    with torch.no_grad():
        smaller.weight.zero_()
    assert larger.weight[0, 0] == 1, "the teacher's weights are its own"


def test_what_was_chosen_fits_together_behind_a_flatten() -> None:
    """A LeNet-5 whose other kernels and weights are zero computes what its heir does."""
    larger, smaller = build("lenet5", seed=0, batch_norm=False, **MNIST), build("lenet5_half", seed=1, batch_norm=False, **MNIST)
    inherit(smaller, larger)
    first, _, _, second, _, _, _, full, *_ = larger.network.children()
    with torch.no_grad():
        for layer, kept in ((first, 3), (second, 8)):
            layer.weight[kept:] = 0
            layer.bias[kept:] = 0
        full.weight[:, 8 * 25 :] = 7.0  # reads nothing but zeros
        images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(smaller(images), larger(images))


def test_batch_norm_and_shortcuts_are_inherited_too() -> None:
    smaller = build("resnet8", seed=0, width=8, stride=1, **CIFAR10)
    larger = build("resnet8", seed=1, width=16, stride=1, **CIFAR10)
    larger(torch.rand(8, 3, 32, 32))  # counts a batch, and moves the statistics
    inherit(smaller, larger)
    held = larger.state_dict()
    assert any("running_mean" in name for name in held)
    for name, tensor in smaller.state_dict().items():
        assert torch.equal(tensor, held[name][tuple(slice(side) for side in tensor.shape)]), name


@pytest.mark.parametrize(
    ("small", "large", "said"),
    [
        (
            ("lenet5_half", False),
            ("lenet5", True),
            r"network\.3\.weight is missing in it and \[8, 3, 5, 5\]",
        ),  # names shift by one with batch norm
        (("lenet5", False), ("lenet5_half", False), r"is \[3, 1, 5, 5\] in it and \[6, 1, 5, 5\]"),
        (("lenet5", True), ("lenet5", False), r"'lenet5'.*network\.1\.weight is missing"),
    ],
)
def test_a_stranger_is_refused_and_nothing_is_changed(small: tuple[str, bool], large: tuple[str, bool], said: str) -> None:
    smaller = build(small[0], seed=0, batch_norm=small[1], **MNIST)
    before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        inherit(smaller, build(large[0], seed=1, batch_norm=large[1], **MNIST))
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())
