"""FedBuff: its queue against a plain one, its arithmetic by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedimpr import seeds
from fedimpr.errors import ConfigError, UpdateError
from fedimpr.update import Update, average
from strategies.devices import Device, Fleet, Load
from strategies.fedbuff import FedBuff, Moved
from strategies.federation import Federation
from strategies.schedule import Step, steps
from strategies.watch import Nobody

PLAIN = Device(
    name="plain",
    source="made up",
    share=1.0,
    macs_per_second=1.0,
    memory_mb=1.0,
    down_mbits=8.0,
    up_mbits=8.0,
    availability=1.0,
    dropout=0.0,
)


def fleet(seconds: list[float], *, device: Device = PLAIN, jitter: float = 0.0, deadline: float | None = None, seed: int = 0) -> Fleet:
    """Devices whose turns take so long, before jitter."""
    loads = [Load(macs=one, memory=0, down=0, up=0) for one in seconds]
    return Fleet(devices=[device] * len(loads), loads=loads, training_jitter=jitter, network_jitter=0.0, deadline=deadline, seed=seed)


def seen(step: Step) -> tuple:
    """A step in plain values."""
    return (
        [(flight.partition, flight.version) for flight in step.arrived],
        [(flight.partition, cause) for flight, cause in step.lost],
        list(step.begun),
        step.seconds,
        set(step.waiting),
    )


def taken(wanted: int, devices: Fleet, **given) -> list[tuple]:
    given = {"concurrency": len(devices.devices), "buffer": 1, "maximum_staleness": None, **given}
    return [seen(step) for step in itertools.islice(steps(devices, **given), wanted)]


def test_two_clients_by_hand() -> None:
    """Turns of 2 and 5 seconds, a step for each update: client 0 ends at 2, 4 and 6, client 1 at 5, which began at version 0."""
    told = taken(4, fleet([2.0, 5.0]))
    assert [arrived for arrived, *_ in told] == [[(0, 0)], [(0, 1)], [(1, 0)], [(0, 2)]]
    assert [seconds for *_, seconds, _ in told] == pytest.approx([2, 2, 1, 1])
    assert [sorted(begun) for _, _, begun, *_ in told] == [[0, 1], [0], [0], [1]]
    assert [waiting for *_, waiting in told] == [{0}, {0}, {2}, {3}]


def test_a_client_whose_update_waits_is_not_drawn_again_before_the_step() -> None:
    """Of three clients the two quick ones wait for the slow one, so a step takes all three, at its pace."""
    for arrived, _, begun, seconds, waiting in taken(5, fleet([1.0, 1.5, 4.0]), buffer=3):
        assert [partition for partition, _ in arrived] == [0, 1, 2] and len({version for _, version in arrived}) == 1
        assert sorted(begun) == [0, 1, 2] and seconds == pytest.approx(4) and waiting == set()


def test_clients_that_end_together_are_all_taken_before_anybody_begins() -> None:
    """Four alike, steps of two: both pairs end at every full second; the second pair is a step old, and those who begin have the newest."""
    told = taken(4, fleet([1.0] * 4), buffer=2)
    assert [[p for p, _ in arrived] for arrived, *_ in told] == [[0, 1], [2, 3]] * 2
    assert [[v for _, v in arrived] for arrived, *_ in told] == [[0, 0], [0, 0], [2, 2], [2, 2]]
    assert [seconds for *_, seconds, _ in told] == pytest.approx([1, 0, 1, 0])


def test_what_is_too_old_is_thrown_away_and_its_client_drawn_again() -> None:
    """Client 1 comes at 5 s, when client 0 has made two steps."""
    told = taken(3, fleet([2.0, 5.0]), maximum_staleness=1)
    assert [arrived for arrived, *_ in told] == [[(0, 0)], [(0, 1)], [(0, 2)]]
    assert told[2][1] == [(1, "its update is 2 server steps old, and strategy.maximum_staleness is 1")] and 1 in told[2][2]


def test_who_is_late_is_given_up_at_the_deadline() -> None:
    told = taken(3, fleet([2.0, 5.0], deadline=3.0))
    assert [arrived[0][0] for arrived, *_ in told] == [0, 0, 0] and [partition for partition, _ in told[1][1]] == [1]


def test_where_nobody_can_be_reached_it_stops() -> None:
    with pytest.raises(UpdateError, match="round 1, virtual clock: nobody could be reached 1000 times in turn. Choose devices with"):
        taken(1, fleet([1.0], device=replace(PLAIN, availability=1e-12)))


def test_where_every_turn_is_lost_it_stops() -> None:
    wanted = "1001 turns were lost and 0 updates of 1 came; the last of client 0: its plain is late: .*Raise the deadline or"
    with pytest.raises(UpdateError, match=wanted):
        taken(1, fleet([5.0], deadline=1.0))


def plainly(devices: Fleet, concurrency: int, buffer: int, oldest: float, wanted: int) -> list[tuple]:
    """The same, written anew: no heap and no generator, but a table of who is at work that is searched for the next event."""
    clients = range(len(devices.devices))
    work: dict[int, dict] = {}
    told, waits, lost, begun = [], [], [], []
    now = last = 0.0
    version = asking = 0
    while len(told) < wanted:
        while True:
            reachable = True
            while reachable and len(work) < concurrency:
                asking += 1
                queue = torch.randperm(len(clients), generator=seeds.generator(devices.seed, "cohort", asking)).tolist()
                idle = [client for client in queue if client not in work and client not in [one["client"] for one in waits]]
                idle = [client for client in idle if devices.there(asking, client)]
                reachable = bool(idle)
                if idle:
                    turn = devices.turn(asking, idle[0])
                    work[idle[0]] = {"client": idle[0], "end": now + turn.seconds, "cause": turn.cause, "version": version}
                    begun.append(idle[0])
            if work:
                break
        now = min(one["end"] for one in work.values())
        ready = [work[client] for client in clients if client in work and work[client]["end"] == now]
        for one in ready:
            age = version - one["version"]
            cause = one["cause"] or (
                None if age <= oldest else f"its update is {age} server steps old, and strategy.maximum_staleness is {oldest}"
            )
            lost += [(one["client"], cause)] if cause else []
            waits += [] if cause else [one]
            del work[one["client"]]
            if len(waits) == buffer:
                told.append(([(w["client"], w["version"]) for w in waits], lost, begun, now - last, {w["version"] for w in work.values()}))
                waits, lost, begun, last, version = [], [], [], now, version + 1
    return told[:wanted]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0, 7.5, 20.0]), min_size=1, max_size=7),
    st.sampled_from([0.0, 0.0, 0.4]),
    st.sampled_from([1.0, 0.7]),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([None, 10.0]),
    st.sampled_from([None, 0, 2]),
    st.integers(0, 1000),
    st.data(),
)
def test_the_queue_is_a_plain_queue(seconds, jitter, availability, dropout, deadline, oldest, seed, data: st.DataObject) -> None:
    if deadline is not None and min(seconds) * 4 > deadline:
        deadline = None  # somebody has to come through
    devices = fleet(seconds, device=replace(PLAIN, availability=availability, dropout=dropout), jitter=jitter, deadline=deadline, seed=seed)
    quick = sum(deadline is None or 4 * one <= deadline for one in seconds)
    concurrency, buffer = data.draw(st.integers(1, len(seconds))), data.draw(st.integers(1, quick))
    if oldest == 0 and concurrency > buffer:
        oldest = 2  # who begins beside a full buffer may always be too old
    given = {"concurrency": concurrency, "buffer": buffer}
    ours = taken(8, devices, **given, maximum_staleness=oldest)
    theirs = plainly(devices, **given, oldest=math.inf if oldest is None else oldest, wanted=8)
    assert ours == theirs
    assert (
        list(itertools.islice(steps(devices, **given, maximum_staleness=oldest), 3, 8))
        == list(itertools.islice(steps(devices, **given, maximum_staleness=oldest), 8))[3:]
    )


def test_a_step_by_hand() -> None:
    """From 10: one update went from 10 to 12 at full weight, one from 8 to 11 at half weight, over K = 2, at rate 0.5.

    10 + 0.5 * (1 * 2 + 0.5 * 3) / 2 = 10.875. The buffer, which is no parameter, becomes the average (1 * 4 + 0.5 * 1) / 1.5 = 3.
    """
    moved = Moved({"w"})
    moved.add({"w": torch.tensor([12.0]), "running": torch.tensor(4.0)}, {"w": torch.tensor([10.0]), "running": torch.tensor(0.0)}, 1.0)
    moved.add({"w": torch.tensor([11.0]), "running": torch.tensor(1.0)}, {"w": torch.tensor([8.0]), "running": torch.tensor(9.0)}, 0.5)
    new = moved.weights({"w": torch.tensor([10.0]), "running": torch.tensor(7.0)}, 0.5)
    assert new["w"].tolist() == [10.875] and new["running"].item() == 3.0 and new["w"].dtype == torch.float32


def test_of_fresh_updates_a_step_of_rate_1_is_their_uniform_average() -> None:
    """w + mean(y - w) = mean(y): FedAvg's, of as many examples each; integer buffers are rounded the same way."""
    draw = torch.Generator().manual_seed(0)
    now = {"w": torch.randn(50, generator=draw), "steps": torch.tensor(3)}
    sent = [{"w": torch.randn(50, generator=draw), "steps": torch.tensor(4 + place)} for place in range(4)]
    moved = Moved({"w"})
    for weights in sent:
        moved.add(weights, now, 1.0)
    new, mean = moved.weights(now, 1.0), average(Update(place, 1, weights, 7) for place, weights in enumerate(sent))
    torch.testing.assert_close(new, mean, rtol=1e-6, atol=1e-7)
    assert new["steps"].item() == round((4 + 5 + 6 + 7) / 4) and new["steps"].dtype == torch.int64


def strategy(devices: Fleet | None, **more) -> FedBuff:
    federation = Federation(
        clients=3, clients_per_node=1, cohort=None, seed=0, settings="", build=None, reference=None,
        shape=(1, 1, 1), device=torch.device("cpu"), watch=Nobody(), fleet=devices,
    )  # type: ignore[arg-type] # fmt: skip
    given = {"buffer": 2, "rate": 1.0, "staleness": "constant", "maximum_staleness": None, "minimum_updates": None, "timeout": 1.0, **more}
    return FedBuff(federation=federation, **given)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buffer": 0}, r"'strategy.buffer' is 0; allowed: an integer in \[1, 3\], the clients with devices that can train"),
        ({"buffer": 4}, r"'strategy.buffer' is 4; allowed: an integer in \[1, 3\]"),
        ({"rate": 0.0}, r"'strategy.rate' is 0.0; allowed: a number > 0"),
        ({"maximum_staleness": -1}, r"'strategy.maximum_staleness' is -1; allowed: null or an integer >= 0"),
        ({"minimum_updates": 3}, r"'strategy.minimum_updates' is 3; allowed: null or an integer in \[1, 2\], the updates of a step"),
    ],
)
def test_a_wrong_number_is_one_line(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy(fleet([1.0] * 3), **wrong)


def test_it_needs_devices() -> None:
    with pytest.raises(ConfigError, match="'devices.kinds' is None; allowed: those of a profile, e.g. devices=phones: FedBuff lives on"):
        strategy(None)
