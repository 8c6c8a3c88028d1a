"""A student may start from some of the units of its teacher's layers."""

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


def heir_of(larger: nn.Module, seed: int, name: str = "lenet5_half") -> nn.Module:
    smaller = build(name, seed=1, batch_norm=False, **MNIST)
    inherit(smaller, larger, torch.Generator().manual_seed(seed))
    return smaller


@pytest.mark.parametrize("seed", range(5))
def test_random_units_fit_together_behind_a_flatten(seed: int) -> None:
    """A LeNet-5 in which the kernels that were not drawn are zero computes what its heir does. Biases tell which were drawn."""
    larger = build("lenet5", seed=0, batch_norm=False, **MNIST)
    smaller = heir_of(larger, seed)
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    kept = []
    for place in (0, 3):
        layer, own = larger.network[place], smaller.network[place]
        drawn = torch.isin(layer.bias, own.bias)
        assert drawn.sum() == len(own.bias) and torch.equal(layer.bias[drawn], own.bias), "in their order"
        with torch.no_grad():
            layer.weight[~drawn], layer.bias[~drawn] = 0, 0
        kept.append(drawn.nonzero().flatten().tolist())
    assert kept != [[0, 1, 2], list(range(8))]
    torch.testing.assert_close(smaller(images), larger(images))


def test_other_draws_are_other_units_and_the_same_ones_the_same() -> None:
    larger = build("lenet5", seed=0, batch_norm=False, **MNIST)
    drawn = [tuple(heir_of(larger, seed).network[3].bias.tolist()) for seed in (0, 0, *range(1, 10))]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 10  # of 12,870 choices


def test_layers_that_meet_in_a_residual_sum_keep_the_same_units() -> None:
    """ResNet-8 has three widths: 8 of 16, 16 of 32, 32 of 64. A channel is known by what was put into its running mean."""
    smaller = build("resnet8", seed=0, width=8, stride=1, **CIFAR10)
    larger = build("resnet8", seed=1, width=16, stride=1, **CIFAR10)
    norms = [layer for layer in larger.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.running_mean.copy_(torch.arange(layer.num_features))
    inherit(smaller, larger, torch.Generator().manual_seed(0))
    kept: dict[int, set[tuple[float, ...]]] = {}
    for layer in (layer for layer in smaller.modules() if isinstance(layer, nn.BatchNorm2d)):
        kept.setdefault(layer.num_features, set()).add(tuple(layer.running_mean.tolist()))
    assert {width: len(choices) for width, choices in kept.items()} == {8: 1, 16: 1, 32: 1} and len(norms) > 3
    assert kept[8] != {tuple(range(8))}


def test_batch_norm_that_the_smaller_one_lacks_is_counted_into_the_kernels() -> None:
    """With all its units it answers as the larger one does in evaluation."""
    larger = build("lenet5", seed=0, batch_norm=True, **MNIST)
    larger(torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2)  # moves the statistics
    larger.eval()
    with torch.no_grad():
        for layer in (layer for layer in larger.modules() if isinstance(layer, nn.BatchNorm2d)):
            layer.weight.uniform_(0.5, 2)
            layer.bias.uniform_(-1, 1)
    before = {name: tensor.clone() for name, tensor in larger.state_dict().items()}
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    whole = build("lenet5", seed=3, batch_norm=False, **MNIST)
    inherit(whole, larger)
    torch.testing.assert_close(whole(images), larger(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in larger.state_dict().items())
    half = heir_of(larger, 0)
    assert torch.isin(half.network[3].bias, whole.network[3].bias).all()
    alone = [nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)).eval(), nn.Sequential(nn.Conv2d(1, 2, 3))]
    inherit(alone[1], alone[0])  # a convolution without biases gets those of its batch norm
    torch.testing.assert_close(alone[1](images), alone[0](images))


def test_batch_norm_that_follows_no_convolution_is_not_counted_into_one() -> None:
    larger = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    with pytest.raises(ConfigError, match=r"3\.weight|1\.weight"):
        inherit(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)), larger)


@pytest.mark.parametrize(
    ("small", "large", "said"),
    [
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
