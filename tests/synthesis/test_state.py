"""What outlives calls: a network with its optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedimpr.synthesis.state import Trained

RATE = 0.5


def adam(parameters) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, RATE)


def layer(weight: float, size: int = 1) -> nn.Linear:
    made = nn.Linear(size, 1, bias=False)
    nn.init.constant_(made.weight, weight)
    return made


def step(module: nn.Linear, optimiser: torch.optim.Optimizer, slope: float) -> None:
    """Down ``slope * weight``."""
    optimiser.zero_grad()
    (slope * module.weight.sum()).backward()
    optimiser.step()


def test_nothing_is_held_before_the_first_call() -> None:
    assert Trained().state_dict() == {}


def test_the_held_module_goes_on_and_the_fresh_one_is_left_alone() -> None:
    held, first, second = Trained(), layer(1.0), layer(7.0)
    module, optimiser = held.resumed(first, adam)
    assert module is first
    step(module, optimiser, 3.0)
    again, same = held.resumed(second, adam)
    assert again is first and same is optimiser
    assert first.weight.item() == pytest.approx(0.5)  # Adam's first step is one rate long: 1 - 0.5
    assert second.weight.item() == 7.0


def test_a_module_of_another_form_starts_anew() -> None:
    held = Trained()
    step(*held.resumed(layer(1.0), adam), 3.0)
    wider = layer(2.0, size=2)
    module, optimiser = held.resumed(wider, adam)
    assert module is wider and wider.weight.tolist() == [[2.0, 2.0]] and not optimiser.state_dict()["state"]


def test_state_goes_out_and_in_with_the_optimisers_moments() -> None:
    """A second step of slope 1 after one of 3. Adam's moments (0.9, 0.999) are m = 0.3 and v = 0.009, then m = 0.9 * 0.3 + 0.1 = 0.37 and
    v = 0.999 * 0.009 + 0.001 = 0.009991; unbiased 0.37 / 0.19 and 0.009991 / 0.001999. Without moments the step would be a whole rate.
    """
    before, after = Trained(), Trained()
    step(*before.resumed(layer(1.0), adam), 3.0)
    state = before.state_dict()
    after.load_state_dict(state)
    module, optimiser = after.resumed(layer(9.0), adam)
    assert module.weight.item() == pytest.approx(0.5)
    step(module, optimiser, 1.0)
    expected = 0.5 - RATE * (0.37 / 0.19) / (0.009991 / 0.001999) ** 0.5
    assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    step(*before.resumed(layer(9.0), adam), 1.0)  # as where nothing was moved
    assert torch.equal(before.state_dict()["module.weight"], module.weight)


def test_state_that_no_module_has_taken_yet_can_go_out_again() -> None:
    before, between, after = Trained(), Trained(), Trained()
    step(*before.resumed(layer(1.0), adam), 3.0)
    between.load_state_dict(before.state_dict())
    after.load_state_dict(between.state_dict())
    one, two = before.state_dict(), after.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_state_is_a_copy_on_the_way_out_and_in() -> None:
    held = Trained()
    module, optimiser = held.resumed(layer(1.0), adam)
    step(module, optimiser, 3.0)
    state = held.state_dict()
    other = Trained()
    other.load_state_dict(state)
    step(module, optimiser, -3.0)  # back a little: to anything but 0.5 or zero
    assert state["module.weight"].item() == pytest.approx(0.5)
    for value in state.values():
        value.zero_()
    assert other.resumed(layer(9.0), adam)[0].weight.item() == pytest.approx(0.5)
    assert held.state_dict()["module.weight"].item() != 0


def test_loaded_state_takes_the_place_of_what_was_held() -> None:
    held, other = Trained(), Trained()
    held.resumed(layer(1.0), adam)
    other.resumed(layer(4.0), adam)
    held.load_state_dict(other.state_dict())
    assert held.resumed(layer(9.0), adam)[0].weight.item() == 4.0


def test_loaded_state_of_another_form_is_forgotten() -> None:
    held, other = Trained(), Trained()
    step(*other.resumed(layer(4.0), adam), 3.0)
    held.load_state_dict(other.state_dict())
    module, optimiser = held.resumed(layer(2.0, size=2), adam)
    assert module.weight.tolist() == [[2.0, 2.0]] and not optimiser.state_dict()["state"]
    assert held.resumed(layer(9.0), adam)[0].weight.item() == 9.0
