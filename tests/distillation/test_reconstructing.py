"""A student may start with the units of its teacher that tell the most, and weights refitted to them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from fedimpr.distillation import reconstruct
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.models import build, inherit

MNIST = {"shape": (1, 28, 28), "classes": 10, "mean": [0.1], "std": [0.3]}


def images(count: int, seed: int = 0) -> Tensor:
    """Noise that is smooth enough for kernels to see something in it."""
    coarse = torch.rand(count, 1, 7, 7, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")


def perceptron(hidden: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def test_a_network_of_the_same_widths_becomes_the_same_function() -> None:
    larger, smaller = (build("lenet5", seed=seed, batch_norm=False, **MNIST).eval() for seed in (0, 1))
    x = images(600)
    before = {name: tensor.clone() for name, tensor in larger.state_dict().items()}
    reconstruct(smaller, larger, x)
    with torch.no_grad():
        gap = (smaller(x) - larger(x)).square().mean() / larger(x).var()
    assert gap < 1e-4, "all but the ridge's share of it"
    assert all(torch.equal(tensor, before[name]) for name, tensor in larger.state_dict().items())
    assert all(p.requires_grad for p in smaller.parameters()) and not smaller.training


def test_a_single_layer_is_its_larger_one() -> None:
    torch.manual_seed(0)
    smaller, larger = (nn.Sequential(nn.Flatten(), nn.Linear(6, 3)) for _ in range(2))
    reconstruct(smaller, larger, torch.randn(50, 1, 2, 3))
    torch.testing.assert_close(smaller[1].weight, larger[1].weight, atol=1e-4, rtol=1e-4)


def test_a_unit_that_repeats_another_one_is_not_missed() -> None:
    """The last layer weighs the unit that is left by the sum of both weights."""
    larger, smaller = perceptron(4, 0), perceptron(3, 1)
    with torch.no_grad():
        larger[1].weight[2] = larger[1].weight[0]
        larger[1].bias[2] = larger[1].bias[0]
        x = torch.randn(400, 1, 2, 3, generator=torch.Generator().manual_seed(2))
        reconstruct(smaller, larger, x)
        torch.testing.assert_close(smaller(x), larger(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_the_unit_that_costs_least_is_left_out(seed: int) -> None:
    """Every choice of four units of five, refitted by another least-squares solver: no one is nearer to the larger network."""
    larger, smaller = perceptron(5, seed), perceptron(4, seed + 100)
    x = torch.randn(300, 1, 2, 3, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        hidden, wanted = larger[2](larger[1](x.flatten(1))), larger(x)
        errors = []
        for kept in combinations(range(5), 4):
            seen = torch.cat([hidden[:, list(kept)], torch.ones(300, 1)], 1)
            errors.append(float((seen @ torch.linalg.lstsq(seen, wanted).solution - wanted).square().mean()))
        reconstruct(smaller, larger, x)
        assert float((smaller(x) - wanted).square().mean()) == pytest.approx(min(errors), rel=0.01, abs=1e-7)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_it_starts_nearer_than_the_units_as_they_were(batch_norm: bool) -> None:
    """On images that it was not fitted to; batch norm of the larger network is counted in."""
    larger = build("lenet5", seed=0, batch_norm=batch_norm, **MNIST)
    with torch.no_grad():
        larger(images(64, 5))  # statistics of its own, where it has some
        larger.eval()
        heir, nearer = (build("lenet5_half", seed=1, batch_norm=False, **MNIST).eval() for _ in range(2))
        inherit(heir, larger)
        reconstruct(nearer, larger, images(1000))
        unseen = images(200, 9)
        far, near = ((model(unseen) - larger(unseen)).square().mean() for model in (heir, nearer))
    assert near < far / 4


def test_a_dead_layer_leaves_the_mean_answer() -> None:
    """Nothing tells the images apart behind it, so the best fit is a constant: the larger network's, which is one, too."""
    larger, smaller = perceptron(4, 0), perceptron(3, 1)
    with torch.no_grad():
        larger[1].bias.fill_(-1e3)
        x = torch.randn(50, 1, 2, 3, generator=torch.Generator().manual_seed(2))
        reconstruct(smaller, larger, x)
        torch.testing.assert_close(smaller(x), larger(x), atol=1e-3, rtol=1e-3)


def refused(smaller: nn.Module, larger: nn.Module) -> str:
    with pytest.raises(ConfigError) as error:
        reconstruct(smaller, larger, images(8))
    return str(error.value)


def test_networks_that_it_cannot_start_are_refused() -> None:
    lenet = build("lenet5", seed=0, batch_norm=False, **MNIST)
    half = build("lenet5_half", seed=0, batch_norm=False, **MNIST)
    resnet = build("resnet8", seed=0, width=8, stride=1, **MNIST)
    assert "a chain" in refused(half, resnet) and "a chain" in refused(resnet, resnet)
    assert "at least 6" in refused(lenet, half)
    assert "without batch norm" in refused(build("lenet5_half", seed=0, batch_norm=True, **MNIST), lenet)
    assert "same 5 layers" in refused(half, nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    in_between = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert "in between" in refused(nn.Sequential(nn.Flatten(), nn.Linear(784, 3), nn.LayerNorm(3), nn.Linear(3, 2)), in_between)
    assert "as many classes" in refused(half, build("lenet5", seed=0, batch_norm=False, **{**MNIST, "classes": 12}))


def test_a_teacher_that_is_broken_is_named() -> None:
    larger, smaller = perceptron(4, 0), perceptron(3, 1)
    with pytest.raises(TeacherError, match="cannot take images of shape"):
        reconstruct(smaller, larger, torch.zeros(4, 1, 5, 5))
    with torch.no_grad():
        larger[1].weight[0, 0] = torch.nan
    with pytest.raises(TeacherError, match="not finite"):
        reconstruct(smaller, larger, torch.zeros(4, 1, 2, 3))
