"""Updates and their average."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.devices import placed
from fedimpr.errors import UpdateError
from fedimpr.update import Average, Update, average, weights_of


def update(partition: int, weight: float, examples: int) -> Update:
    return Update(partition, 1, {"w": torch.tensor([weight]), "n": torch.tensor(round(weight))}, examples)


def test_what_travels_is_contiguous_and_apart_however_the_model_lies_in_memory() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent = weights_of(placed(model, torch.device("cpu")))
    assert not model[0].weight.is_contiguous() and all(tensor.is_contiguous() for tensor in sent.values())
    torch.testing.assert_close(sent, before, rtol=0, atol=0)
    for tensor in model.state_dict().values():
        tensor.zero_()
    torch.testing.assert_close(sent, before, rtol=0, atol=0)


def test_the_average_weighs_by_examples() -> None:
    """(1 * 1 + 3 * 4) / 4 = 3.25; the integer buffer is rounded to 3."""
    mean = average([update(0, 1.0, 1), update(1, 4.0, 3)])
    assert mean["w"].item() == 3.25 and mean["n"].item() == 3 and mean["n"].dtype == torch.int64


def test_an_average_grows_by_one_update_at_a_time() -> None:
    """(2 * 1 + 1 * 7) / 3 = 3 after two updates, (9 + 3 * 11) / 6 = 7 after three."""
    mean = Average()
    mean.add(update(0, 1.0, 2))
    mean.add(update(1, 7.0, 1))
    types = {"w": torch.zeros(1), "n": torch.tensor(0)}
    assert mean.weights(types)["w"].item() == 3.0
    mean.add(update(2, 11.0, 3))
    got = mean.weights(types)
    assert got["w"].item() == 7.0 and got["w"].dtype == torch.float32 and got["n"].dtype == torch.int64 and mean.examples == 6


@pytest.mark.parametrize("held", [1, 64 << 20])
def test_many_updates_and_sums_of_others_take_turns(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of i with i + 1 examples, i below 20: examples 210, sum 19 * 20 * 21 / 3 = 2660. Another average's of the same come in between."""
    monkeypatch.setattr("fedimpr.update.HELD", held)
    mean, other = Average(), Average()
    for i in range(20):
        other.add(update(i, float(i), i + 1))
    for i in range(20):
        mean.add(update(i, float(i), i + 1))
        if i == 10:
            mean.add_sums(other.sums, other.examples)
    assert (mean.sums["w"].item(), mean.examples) == (2 * 2660.0, 2 * 210)
    assert mean.weights(REFERENCE)["n"].item() == other.weights(REFERENCE)["n"].item() == round(other.sums["n"].item() / 210)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 50)), min_size=1, max_size=8), st.randoms())
def test_the_average_does_not_depend_on_the_order_of_arrival(values: list, random) -> None:
    updates = [update(i, weight, examples) for i, (weight, examples) in enumerate(values)]
    shuffled = updates.copy()
    random.shuffle(shuffled)
    assert torch.equal(average(updates)["w"], average(shuffled)["w"])


REFERENCE = {"w": torch.zeros(1), "n": torch.tensor(0)}


@pytest.mark.parametrize(
    ("weights", "examples", "message"),
    [
        ({"w": torch.zeros(1)}, 1, "a tensor is missing .value 'n'"),
        ({**REFERENCE, "x": torch.zeros(1)}, 1, "a tensor is unknown .value 'x'"),
        ({**REFERENCE, "w": torch.zeros(2)}, 1, "tensor 'w' must be"),
        ({**REFERENCE, "w": torch.zeros(1, dtype=torch.float64)}, 1, "tensor 'w' must be"),
        ({**REFERENCE, "w": torch.tensor([torch.nan])}, 1, "tensor 'w' is not finite .value nan"),
        (REFERENCE, 0, "the number of examples must be >= 1"),
    ],
)
def test_what_cannot_be_used_is_named_with_client_and_round(weights: dict, examples: int, message: str) -> None:
    with pytest.raises(UpdateError, match=f"client 7, round 3, checking the update: {message}"):
        Update(7, 3, weights, examples).check(REFERENCE)


def test_a_good_update_passes() -> None:
    Update(0, 1, REFERENCE, 1).check(REFERENCE)


def test_large_values_are_finite_even_where_their_sum_is_not() -> None:
    large = {"w": torch.full((1,), 3e38), "v": torch.full((4,), 3e38)}
    assert not large["v"].sum().isfinite()
    Update(0, 1, large, 1).check(large)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_value_hides_in_a_large_tensor(bad: float) -> None:
    weights = {"w": torch.zeros(1000), "v": torch.zeros(1000)}
    weights["w"][617], weights["w"][3] = bad, -torch.inf
    with pytest.raises(UpdateError, match="tensor 'w' is not finite"):
        Update(0, 1, weights, 1).check({"w": torch.zeros(1000), "v": torch.zeros(1000)})


def test_a_sum_in_blocks_is_the_sum() -> None:
    """More elements than a block holds, and not a multiple: 2 * i + 3 * (i + 1) over 5 examples is i + 0.6."""
    numbers = torch.arange(150_000).view(3, 50_000)
    mean = Average()
    for partition, examples in ((0, 2), (1, 3)):
        mean.add(Update(partition, 1, {"w": (numbers + partition).double()}, examples))
    torch.testing.assert_close(mean.weights({"w": numbers.double()})["w"], numbers.double() + 0.6, rtol=1e-15, atol=1e-10)


def test_types_do_not_mix_in_a_sum() -> None:
    """2^24 + 1 is no float32: (2^24 + 1 + 2^24 + 3) / 2 = 2^24 + 2, and (0.5 + 1.5) / 2 = 1 on either side of it."""
    weights = [{"a": torch.tensor([f]), "n": torch.tensor(2**24 + n), "b": torch.tensor([-f])} for f, n in ((0.5, 1), (1.5, 3))]
    mean = average(Update(place, 1, one, 1) for place, one in enumerate(weights))
    assert {name: tensor.item() for name, tensor in mean.items()} == {"a": 1.0, "n": 2**24 + 2, "b": -1.0}
    assert list(mean) == ["a", "n", "b"] and mean["n"].dtype == torch.int64


@given(st.lists(st.tuples(st.sampled_from([torch.float32, torch.float64, torch.int64]), st.integers(0, 90)), min_size=1, max_size=6))
def test_an_average_in_blocks_is_that_of_each_tensor(tensors: list) -> None:
    """Blocks of 64 elements, tensors of 0 to 90."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fedimpr.update.BLOCK", 64)
        ones = {f"t{i}": torch.arange(size).to(dtype) + i for i, (dtype, size) in enumerate(tensors)}
        threes = {name: 3 * tensor for name, tensor in ones.items()}
        mean = Average()
        for place, weights in enumerate((ones, threes)):
            update = Update(place, 1, weights, 1)
            update.check(ones)
            mean.add(update)
        assert all(torch.equal(mean.weights(ones)[name], 2 * tensor) for name, tensor in ones.items())
        assert all(torch.equal(mean.sums[name], 4.0 * tensor) for name, tensor in ones.items())
