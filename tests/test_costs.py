"""What training costs, against numbers worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedimpr.costs import training_cost
from fedimpr.models import build
from tests.makers import Linear


def test_a_linear_map_by_hand() -> None:
    """9 pixels to 2 logits, 4 images: 18 multiply-accumulates forward and 18 for the weights' gradient; images need none.

    Memory: 18 weights, their gradients and momentum; of the forward pass the 4 x 9 pixels stay. All of 4 bytes.
    """
    cost = training_cost(Linear([[1.0] * 9, [2.0] * 9]), (1, 3, 3), 4)
    assert (cost.macs, cost.memory) == (36, 4 * (3 * 18 + 4 * 9))


def test_lenet5_by_hand() -> None:
    """On 28x28, seen as 32x32 by padding: convolutions of 25 x 6 x 28 x 28 and 150 x 16 x 10 x 10, layers of 400 x 120, 120 x 84, 84 x 10.

    Backward every layer costs twice what it does forward, but for the first, whose input needs no gradient.
    """
    layers = [25 * 6 * 28 * 28, 150 * 16 * 10 * 10, 400 * 120, 120 * 84, 84 * 10]
    model = build("lenet5", shape=(1, 28, 28), classes=10, mean=[0.5], std=[0.5], seed=0, batch_norm=False)
    assert training_cost(model, (1, 28, 28), 16).macs == 3 * sum(layers) - layers[0]


def test_memory_grows_with_the_batch_and_cost_an_image_does_not() -> None:
    """Twice as many further images leave twice as much."""
    model = build("resnet8", shape=(3, 16, 16), classes=10, mean=[0.5] * 3, std=[0.5] * 3, seed=0, width=4, stride=1)
    two, four, eight = (training_cost(model, (3, 16, 16), batch) for batch in (2, 4, 8))
    assert eight.memory - four.memory == pytest.approx(2 * (four.memory - two.memory), rel=1e-3)
    assert two.macs == four.macs == eight.macs


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 3)).eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    training_cost(model, (1, 8, 8), 2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()) and not model.training
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
