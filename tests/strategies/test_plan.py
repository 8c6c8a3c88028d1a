"""A synchronous round on the virtual clock: who is asked, who is left out and why, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import UpdateError
from strategies.cohort import cohort_of
from strategies.devices import Device, Fleet, Load
from strategies.federation import Federation
from strategies.plan import Ledger, planned
from strategies.records import shared
from strategies.watch import Nobody
from tests.strategies.made_up import PLAIN

# A second down, 3 seconds of training, 2 seconds up.
QUICK = replace(PLAIN, name="quick")
SLOW = replace(QUICK, name="slow", macs_per_second=1e5)  # 33 seconds in all
SMALL = replace(QUICK, name="small", memory_mb=0.5)
LOAD = Load(macs=3e6, memory=1_000_000, down=1_000_000, up=1_000_000)


class Told(Nobody):
    """Remembers who was excluded."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def excluded(self, error: UpdateError) -> None:
        self.errors.append(str(error))


def federation(*devices: Device, deadline: float | None = None, cohort: int | None = None, per_node: int = 1) -> Federation:
    """A client for each device; without any there are three, and no virtual clock."""
    fleet = Fleet(devices=devices, loads=[LOAD] * len(devices), training_jitter=0.0, network_jitter=0.0, deadline=deadline, seed=0)
    return Federation(
        clients=len(devices) or 3, clients_per_node=per_node, cohort=cohort, seed=0, settings="", build=None, reference=None,
        shape=(1, 1, 1), device=torch.device("cpu"), watch=Told(), fleet=fleet if devices else None,
    )  # type: ignore[arg-type] # fmt: skip


NODES = [100, 101, 102, 103]


def test_a_round_lasts_until_the_last_one_has_answered() -> None:
    plan = planned(federation(QUICK, SLOW), NODES, 1, None, 1_000_000)
    assert plan.asked == {100: [0], 101: [1]} and plan.left_out == [] and plan.seconds == pytest.approx(33)
    assert plan.down == {0: 1_000_000, 1: 1_000_000} and plan.minimum == 2


def test_who_is_late_is_not_trained_but_was_sent_the_weights_and_the_round_lasts_until_the_deadline() -> None:
    fed = federation(QUICK, SLOW, QUICK, deadline=10.0)
    plan = planned(fed, NODES, 2, 2, 1_000_000)
    assert plan.asked == {100: [0], 102: [2]} and plan.seconds == 10.0 and sum(plan.down.values()) == 3_000_000
    assert fed.watch.errors == ["client 1, round 2, virtual clock: its slow is late: the turn takes 33 s, and the deadline is 10 s"]


def test_who_drops_out_holds_nobody_up() -> None:
    """Its connection breaks: the server knows at once."""
    shaky = replace(SLOW, dropout=0.999999)
    fed = federation(QUICK, shaky)
    plan = planned(fed, NODES, 1, 1, 10)
    assert plan.asked == {100: [0]} and plan.seconds == pytest.approx(max(6, plan.turns[1].seconds)) and plan.turns[1].seconds < 33
    assert "client 1, round 1, virtual clock: its slow dropped out after" in fed.watch.errors[0]


def test_below_the_minimum_it_stops_with_round_numbers_cause_and_remedy() -> None:
    wanted = (
        r"round 7, virtual clock: 1 updates can come of 2 clients that are there, below strategy.minimum_updates = null, all of them; "
        r"first: client 1, .*late.*\. Lower strategy.minimum_updates, raise the deadline, or choose other devices\."
    )
    with pytest.raises(UpdateError, match=wanted):
        planned(federation(QUICK, SLOW, deadline=10.0), NODES, 7, None, 10)


def test_where_nobody_is_there_it_stops() -> None:
    away = federation(*[replace(QUICK, availability=1e-9)] * 3)
    for minimum in (None, 1):
        with pytest.raises(UpdateError, match="0 updates can come of 0 clients that are there"):
            planned(away, NODES, 1, minimum, 10)


def test_who_has_too_little_memory_never_takes_part_and_is_told_once() -> None:
    fed = federation(QUICK, SMALL)
    for round in (1, 2, 3):
        assert planned(fed, NODES, round, None, 10).asked == {100: [0]}
    assert fed.watch.errors == [
        "client 1, round 1, virtual clock: its small has 0.5 MB for training, which takes 1 MB: it never takes part"
    ]


@given(st.integers(1, 50), st.integers(1, 4))
def test_a_cohort_is_drawn_of_those_that_are_there(round: int, size: int) -> None:
    fed = federation(*[replace(QUICK, availability=0.5)] * 3, SMALL, cohort=size)
    chosen = [partition for partitions in cohort_of(fed, NODES, round).values() for partition in partitions]
    there = [partition for partition in range(3) if fed.fleet.there(round, partition)]
    assert len(chosen) == min(size, len(there)) and set(chosen) <= set(there) and chosen == sorted(chosen)


def test_with_everybody_there_devices_draw_the_cohort_that_would_be_drawn_without() -> None:
    for round in range(1, 20):
        assert cohort_of(federation(QUICK, QUICK, QUICK, cohort=2), NODES, round) == cohort_of(federation(cohort=2), NODES, round)


def test_what_a_node_is_sent_once_is_shared_by_its_clients_but_not_by_devices() -> None:
    """10 bytes for two clients of one node are 5 each; a third has a node of its own."""
    assert planned(federation(per_node=2), NODES, 1, None, 10).down == {0: 5, 1: 5, 2: 10}
    assert planned(federation(QUICK, QUICK, QUICK, per_node=2), NODES, 1, None, 10).down == {0: 10, 1: 10, 2: 10}


@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**6), min_size=1, max_size=50, unique=True))
def test_shares_add_up_to_the_last_byte(total: int, partitions: list[int]) -> None:
    parts = shared(total, partitions)
    assert list(parts) == partitions and sum(parts.values()) == total and max(parts.values()) - min(parts.values()) <= 1


@pytest.mark.parametrize("devices", [(), (QUICK,)])
def test_a_ledger_goes_on_where_it_was(devices: tuple[Device, ...]) -> None:
    straight, before, after = (Ledger(federation(*devices)) for _ in range(3))
    straight.bill(3, 4, 0.1)
    before.bill(3, 4, 0.1)
    after.load_state_dict(before.state_dict())
    assert after.bill(5, 6, 0.7) == straight.bill(5, 6, 0.7)
    assert straight.bill(1, 1, 0.0).total_down == 9 and (straight.seconds is None) == (devices == ())
