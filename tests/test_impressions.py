"""Impressions and the bank that holds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import FedimprError
from fedimpr.impressions import Bank, Impressions, Source

SOURCE = Source("a model", "di", 1, 0)


def numbered(numbers: list[int]) -> Impressions:
    """One-pixel images, told apart by their labels."""
    count = len(numbers)
    return Impressions(torch.full((count, 1, 1, 1), 0.5), torch.full((count, 2), 0.5), torch.tensor(numbers, dtype=torch.int64), 0)


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=6))
def test_a_bank_holds_the_newest(capacity: int, sizes: list[int]) -> None:
    bank, seen = Bank(capacity), []
    for size in sizes:
        batch = list(range(len(seen), len(seen) + size))
        bank.add(numbered(batch), SOURCE)
        seen += batch
        assert sorted(bank.labels.tolist()) == seen[-capacity:] if seen else len(bank) == 0


@given(st.integers(1, 10), st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(1, 8))
def test_state_goes_out_and_in(capacity: int, sizes: list[int], more: int) -> None:
    bank, other = Bank(capacity), Bank(1)
    for round, size in enumerate(sizes):
        bank.add(numbered([size] * size), Source("a model", "di", round, 0))
    other.load_state_dict(bank.state_dict())
    for one in (bank, other):
        one.add(numbered([99] * more), SOURCE)
    assert torch.equal(bank.labels, other.labels)
    assert [bank.source_of(i) for i in range(len(bank))] == [other.source_of(i) for i in range(len(other))]
    one, two = (b.sample(5, torch.Generator().manual_seed(0)) for b in (bank, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_every_impression_knows_where_it_came_from() -> None:
    bank, later = Bank(3), Source("a model", "cmi", 2, 0)
    bank.add(numbered([1, 2]), SOURCE)
    bank.add(numbered([3, 4]), later)
    assert {int(label): bank.source_of(i).method for i, label in enumerate(bank.labels)} == {2: "di", 3: "cmi", 4: "cmi"}


def test_what_is_no_impression_is_refused() -> None:
    good = numbered([1, 2])
    with pytest.raises(FedimprError, match=r"leave the range \[0, 1\]"):
        Impressions(good.images + 1, good.targets, good.labels, 0)
    with pytest.raises(FedimprError, match="not finite"):
        Impressions(good.images * torch.nan, good.targets, good.labels, 0)
    with pytest.raises(FedimprError, match="labels"):
        Impressions(good.images, good.targets, good.labels[:1], 0)
    with pytest.raises(FedimprError, match="bank is empty"):
        Bank(3).sample(1, torch.Generator())
    with pytest.raises(FedimprError, match="at least one"):
        Bank(0)
