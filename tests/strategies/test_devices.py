"""The virtual clock: pure arithmetic and draws that nobody can move by asking in another order."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedimpr.costs import training_cost
from fedimpr.errors import ConfigError
from sim.config import composed
from strategies.devices import Device, Fleet, Load, dealt
from tests.strategies.made_up import PLAIN

LOAD = Load(macs=3e6, memory=900_000, down=2_000_000, up=500_000)


def fleet(*devices: Device, load: Load = LOAD, **more) -> Fleet:
    given = {"training_jitter": 0.0, "network_jitter": 0.0, "deadline": None, "seed": 0, **more}
    return Fleet(devices=devices, loads=[load] * len(devices), **given)


def test_a_turn_is_download_training_and_upload() -> None:
    """2 MB at 1 MB/s, 3 million multiply-accumulates at 1 million a second, 0.5 MB at 0.5 MB/s."""
    turn = fleet(PLAIN).turn(1, 0)
    assert (turn.download, turn.training, turn.upload, turn.seconds) == pytest.approx((2, 3, 1, 6))
    assert turn.cause is None and turn.device == "plain"


@pytest.mark.parametrize(("deadline", "seconds", "late"), [(5.0, 5.0, True), (6.0, 6.0, False), (7.0, 6.0, False)])
def test_who_misses_the_deadline_is_late(deadline: float, seconds: float, late: bool) -> None:
    turn = fleet(PLAIN, deadline=deadline).turn(1, 0)
    assert turn.seconds == pytest.approx(seconds)
    assert turn.cause == ("its plain is late: the turn takes 6 s, and the deadline is 5 s" if late else None)


def test_who_drops_out_does_so_within_the_turn_and_as_often_as_its_kind_does() -> None:
    """0.3 of 1,000 turns: 300, with a deviation of sqrt(1000 * 0.3 * 0.7) = 14.5; five of them are 73. Half way on average."""
    shaky = fleet(replace(PLAIN, dropout=0.3))
    gone = [turn for round in range(1000) if (turn := shaky.turn(round, 0)).cause is not None]
    assert abs(len(gone) - 300) < 73 and all(0 <= turn.seconds < 6 and "dropped out after" in str(turn.cause) for turn in gone)
    assert statistics.fmean(turn.seconds for turn in gone) == pytest.approx(3, abs=5 * 6 / math.sqrt(12 * len(gone)))


def test_who_drops_out_after_the_deadline_is_late() -> None:
    turns = [fleet(replace(PLAIN, dropout=0.99), deadline=1.0).turn(round, 0) for round in range(100)]
    assert {("late" in str(turn.cause), turn.seconds == 1.0) for turn in turns} == {(True, True), (False, False)}


def test_a_device_is_there_as_often_as_its_kind_is() -> None:
    """0.8 of 1,000 rounds: 800, give or take 5 * sqrt(1000 * 0.8 * 0.2) = 63."""
    away = fleet(replace(PLAIN, availability=0.8))
    assert abs(sum(away.there(round, 0) for round in range(1000)) - 800) < 63
    assert all(fleet(PLAIN).there(round, 0) for round in range(100))


def test_jitter_has_the_median_one_and_the_deviation_that_was_asked_for() -> None:
    """Of 1,000 logarithms: the mean has a deviation of 0.2 / sqrt(1000), their deviation one of about 0.2 / sqrt(2000)."""
    shaking = fleet(PLAIN, training_jitter=0.2, network_jitter=0.1)
    turns = [shaking.turn(round, 0) for round in range(1000)]
    logs = [math.log(turn.training / 3) for turn in turns]
    assert abs(statistics.fmean(logs)) < 5 * 0.2 / math.sqrt(1000) and statistics.stdev(logs) == pytest.approx(
        0.2, abs=5 * 0.2 / math.sqrt(2000)
    )
    assert statistics.stdev(math.log(turn.upload) for turn in turns) == pytest.approx(0.1, abs=5 * 0.1 / math.sqrt(2000))
    assert all(turn.download / turn.upload == pytest.approx(2) for turn in turns)  # one network


def test_who_has_too_little_memory_is_not_able() -> None:
    exact = replace(LOAD, memory=1_000_000)
    assert fleet(PLAIN, load=exact).able(0) and not fleet(PLAIN, load=replace(exact, memory=1_000_001)).able(0)


DEVICES = st.builds(
    Device,
    name=st.just("any"),
    source=st.just("made up"),
    share=st.floats(0.01, 10),
    macs_per_second=st.floats(1e3, 1e12),
    memory_mb=st.floats(0.1, 1e4),
    down_mbits=st.floats(0.01, 1e4),
    up_mbits=st.floats(0.01, 1e4),
    availability=st.floats(0.01, 1),
    dropout=st.floats(0, 0.99),
)


@given(DEVICES, st.integers(0, 2**32), st.floats(1, 100), st.floats(0, 1))
def test_a_faster_device_is_never_later(device: Device, seed: int, factor: float, jitter: float) -> None:
    """In the same round of the same run: more bandwidth or speed shortens its part and leaves the others, and the luck is the same."""
    settings = {"seed": seed, "training_jitter": jitter, "network_jitter": jitter}
    before = fleet(device, **settings).turn(3, 0)
    for key, part in (("down_mbits", "download"), ("up_mbits", "upload"), ("macs_per_second", "training")):
        after = fleet(replace(device, **{key: factor * getattr(device, key)}), **settings).turn(3, 0)
        assert getattr(after, part) == pytest.approx(getattr(before, part) / factor) and after.seconds <= before.seconds
        assert all(getattr(after, other) == getattr(before, other) for other in ("download", "training", "upload") if other != part)
        assert (after.cause is None) == (before.cause is None)


@given(st.lists(DEVICES, min_size=1, max_size=5), st.integers(0, 2**32), st.data())
def test_the_order_of_questions_changes_no_answer(devices: list[Device], seed: int, data: st.DataObject) -> None:
    settings = {"seed": seed, "training_jitter": 0.5, "network_jitter": 0.5, "deadline": 10.0}
    one, two = fleet(*devices, **settings), fleet(*devices, **settings)
    questions = [(round, partition) for round in (1, 2, 3) for partition in range(len(devices))]
    answers = {asked: (one.there(*asked), one.turn(*asked)) for asked in questions}
    for asked in data.draw(st.permutations(questions)):
        assert (two.there(*asked), two.turn(*asked)) == answers[asked]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda shares: sum(shares) > 0.1), st.integers(1, 50), st.integers(0, 9))
def test_kinds_are_dealt_by_their_shares(shares: list[float], clients: int, seed: int) -> None:
    kinds = [replace(PLAIN, name=str(place), share=share) for place, share in enumerate(shares)]
    hand = dealt(kinds, clients, seed)
    assert len(hand) == clients and hand == dealt(kinds, clients, seed)
    for kind in kinds:
        assert abs(hand.count(kind) - clients * kind.share / sum(shares)) < 1


def test_another_seed_deals_in_another_order() -> None:
    kinds = [replace(PLAIN, name=name) for name in "ab"]
    assert len({tuple(device.name for device in dealt(kinds, 20, seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("macs_per_second", 0.0, "a number > 0"),
        ("memory_mb", -1.0, "a number > 0"),
        ("down_mbits", math.nan, "a number > 0"),
        ("up_mbits", math.inf, "a number > 0"),
        ("share", -1.0, "a number >= 0"),
        ("availability", 0.0, "a number in (0, 1]"),
        ("dropout", 1.0, "a number in [0, 1)"),
    ],
)
def test_a_number_out_of_range_is_one_line(key: str, value: float, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(PLAIN, **{key: value})
    assert str(caught.value) == f"config key '{key}' is {value!r}; allowed: {allowed}"


def test_kinds_without_any_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="one kind or more with a share > 0"):
        dealt([replace(PLAIN, share=0.0)], 3, 0)


def test_the_phones_are_as_fast_as_their_source_says() -> None:
    """10 images of FEMNIST through the CNN of LEAF took 1642, 588 and 179 ms."""
    first = (nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    network = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 2048), nn.ReLU(), nn.Linear(2048, 62))
    batch = 10 * training_cost(network, (1, 28, 28), 10).macs
    kinds = (composed(["devices=phones"]).devices or {})["kinds"].values()
    assert [batch / kind["macs_per_second"] for kind in kinds] == pytest.approx([1.642, 0.588, 0.179], rel=1e-3)


def test_the_boards_are_as_fast_as_their_source_says() -> None:
    """Linpack: 0.370, 11.889, 30.249 and 53.333 billion operations a second, two of which are a multiply-accumulate."""
    kinds = (composed(["devices=boards"]).devices or {})["kinds"].values()
    assert [2 * kind["macs_per_second"] / 1e9 for kind in kinds] == pytest.approx([0.370, 11.889, 30.249, 53.333], rel=1e-3)
