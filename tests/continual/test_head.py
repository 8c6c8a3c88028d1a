"""A head that grows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedimpr.continual.head import adjust, grown
from fedimpr.errors import FedimprError
from fedimpr.models import build

DIGITS = {"shape": (1, 16, 16), "mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize("name", ["lenet5", "resnet8"])
def test_old_outputs_stay_to_the_bit_and_new_ones_are_the_fresh_model_s(name: str) -> None:
    options = {"batch_norm": False} if name == "lenet5" else {"width": 8, "stride": 1}
    old, new = (build(name, classes=k, seed=s, **DIGITS, **options).eval() for k, s in ((2, 0), (5, 1)))
    fresh, images = new.state_dict(), torch.rand(3, 1, 16, 16)
    weights = grown(old.state_dict(), {name: tensor.clone() for name, tensor in fresh.items()})
    head = [name for name, tensor in fresh.items() if tensor.shape != old.state_dict()[name].shape]
    assert len(head) == 2  # weight and bias
    assert all(torch.equal(weights[name][2:], fresh[name][2:]) for name in head)
    new.load_state_dict(weights)
    torch.testing.assert_close(new(images)[:, :2], old(images))


def test_nothing_grows_where_nothing_is_new() -> None:
    weights = build("lenet5", classes=3, seed=0, batch_norm=True, **DIGITS).state_dict()
    same = grown(weights, build("lenet5", classes=3, seed=1, batch_norm=True, **DIGITS).state_dict())
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_head_neither_shrinks_nor_moves_to_another_architecture() -> None:
    weights = nn.Linear(4, 5).state_dict()
    with pytest.raises(FedimprError, match=r"'weight' cannot grow .*\(5, 4\), \(3, 4\)"):
        grown(weights, nn.Linear(4, 3).state_dict())
    with pytest.raises(FedimprError, match="same architecture"):
        grown(weights, nn.Linear(4, 5, bias=False).state_dict())


def test_what_was_shown_more_often_is_named_less_easily() -> None:
    """Probabilities 3 : 1 : 1 among classes that were shown 3 : 1 : 1 say nothing: adjusted they are even."""
    head = nn.Linear(2, 3)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([3.0, 1.0, 1.0]).log() + 5)
    adjust(head, torch.tensor([30.0, 10.0, 10.0]))
    torch.testing.assert_close(head(torch.rand(4, 2)).softmax(1), torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("head", [nn.Linear(2, 3, bias=False), nn.Linear(2, 4)])
def test_a_head_that_cannot_be_adjusted_is_refused(head: nn.Linear) -> None:
    with pytest.raises(FedimprError, match="needs a bias of 3 outputs"):
        adjust(head, torch.ones(3))
