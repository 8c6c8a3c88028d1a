"""A head that grows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedimpr.continual.head import grown
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
