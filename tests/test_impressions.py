"""Impressions and the bank that holds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import FedimprError
from fedimpr.impressions import Bank, Impressions, Sample, Source

SOURCE = Source("a model", "di", 1, 0)


def numbered(numbers: list[int]) -> Impressions:
    """One-pixel images, told apart by their labels."""
    count = len(numbers)
    return Impressions(torch.full((count, 1, 1, 1), 0.5), torch.full((count, 2), 0.5), torch.tensor(numbers, dtype=torch.int64), 0)


def pictures(pixels: torch.Tensor) -> Impressions:
    """Impressions with these pixels."""
    count = len(pixels)
    return Impressions(pixels, torch.full((count, 2), 0.5), torch.zeros(count, dtype=torch.int64), 0)


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=6))
def test_a_bank_holds_the_newest(capacity: int, sizes: list[int]) -> None:
    bank, seen = Bank(capacity), []
    for size in sizes:
        batch = list(range(len(seen), len(seen) + size))
        bank.add(numbered(batch), SOURCE)
        seen += batch
        assert len(bank) == min(len(seen), capacity)
        assert sorted(bank.labels.tolist()) == seen[-capacity:]


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=6))
def test_an_impression_stays_whole_and_at_its_place_until_it_leaves(capacity: int, sizes: list[int]) -> None:
    """The n-th impression ever is told by its label n, its one pixel n / 255 (n < 90), its target n / 100 and its origin."""
    bank, total, before = Bank(capacity), 0, {}
    for turn, size in enumerate(sizes):
        numbers = torch.arange(total, total + size)
        targets = torch.stack([numbers / 100, 1 - numbers / 100], 1)
        bank.add(Impressions((numbers / 255).view(-1, 1, 1, 1), targets, numbers, 0), Source("a model", "di", turn, 0))
        total += size
        now = {number: place for place, number in enumerate(bank.labels.tolist())}
        assert all(before.get(number, place) == place for number, place in now.items())
        before = now
    ends = [sum(sizes[: turn + 1]) for turn in range(len(sizes))]
    for number, place in before.items():
        assert round(255 * bank.images[place].item()) == number
        assert bank.targets[place, 0].item() == pytest.approx(number / 100)
        assert bank.source_of(place).round == sum(number >= end for end in ends)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_pixels_come_out_as_the_nearest_of_256_values(pixels: list[float]) -> None:
    bank, added = Bank(len(pixels)), torch.tensor(pixels).view(-1, 1, 1, 1)
    bank.add(pictures(added), SOURCE)
    out = bank.images
    assert out.dtype == torch.float32 and out.shape == added.shape
    assert float((out - added).abs().max()) <= 1 / 510 + 1e-7
    assert torch.equal(out, (255 * out).round() / 255)


def test_pixels_that_are_multiples_of_a_255th_come_out_as_they_went_in() -> None:
    bank, every = Bank(256), (torch.arange(256) / 255).view(-1, 1, 1, 1)
    bank.add(pictures(every), SOURCE)
    assert torch.equal(bank.images, every)
    assert bank.state_dict()["images"].dtype == torch.uint8  # a quarter of the memory, on disk too


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(0, 4), st.integers(1, 12))
def test_a_thinned_bank_holds_the_first_of_each_class_and_takes_others_in(labels: list[int], most: int, capacity: int) -> None:
    bank = Bank(capacity)
    for label in labels:
        bank.add(numbered([label]), SOURCE)
    held = bank.labels.tolist()
    bank.thin(most)
    kept = [label for place, label in enumerate(held) if held[:place].count(label) < most]
    assert bank.labels.tolist() == kept
    bank.add(numbered([9]), SOURCE)
    assert bank.labels.tolist() == ([*kept, 9] if len(kept) < capacity else [9, *kept[1:]])


def test_thinning_keeps_the_share_of_every_source() -> None:
    """Classes 0, 0, 1 from one source and 0, 0 from another are three groups; one of each group stays."""
    bank, later = Bank(9), Source("later", "di", 2, 0)
    bank.add(numbered([0, 0, 1]), SOURCE)
    bank.add(numbered([0, 0]), later)
    assert bank.groups == 3 and Bank(9).groups == 0
    bank.thin(1)
    assert bank.labels.tolist() == [0, 1, 0] and bank.groups == 3
    assert bank.came_from(SOURCE).tolist() == [True, True, False] and bank.came_from(later).tolist() == [False, False, True]


def test_a_sample_says_where_its_images_stand() -> None:
    bank = Bank(5)
    bank.add(pictures(torch.arange(7).view(-1, 1, 1, 1) / 255), SOURCE)
    sample = bank.sample(200, torch.Generator().manual_seed(0))
    assert isinstance(sample, Sample) and sample.images.shape == (200, 1, 1, 1) and sample.places.dtype == torch.int64
    assert torch.equal(sample.images, bank.images[sample.places])
    assert set(sample.places.tolist()) == set(range(5))  # all of five, in 200 draws: missed with odds of 5 * 0.8^200 < 1e-18
    assert set((255 * sample.images).round().int().flatten().tolist()) == {2, 3, 4, 5, 6}
    again, other = (bank.sample(200, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(sample.places, again.places) and not torch.equal(sample.places, other.places)


def test_a_bank_that_is_not_full_gives_only_what_was_added() -> None:
    bank = Bank(100)
    bank.add(pictures(torch.ones(2, 1, 1, 1)), SOURCE)
    assert set(bank.sample(50, torch.Generator().manual_seed(0)).places.tolist()) == {0, 1}


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
