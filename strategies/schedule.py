"""Who trains when where nobody waits for the others: an event queue on the virtual clock.

It depends on devices, loads and seed alone, never on real time or on weights. So what arrives for a server step is known before anybody
trains, and a run that goes on later finds its place by counting steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fedimpr import seeds
from fedimpr.errors import UpdateError
from strategies.devices import STAGE, Fleet, Turn

TRIES = 1000  # how often a server that nobody works for looks for somebody, and the turns that may be lost for each update that comes


@dataclass(frozen=True, order=True)
class Flight:
    """A client at work.

    Attributes:
        end: when its update is there, or the server knows that none will come: seconds since the start of the run.
        partition: the client.
        version: the server steps that had been made when it was sent the weights.
        turn: on the clock.
    """

    end: float
    partition: int
    version: int = field(compare=False)
    turn: Turn = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What lies between two server steps.

    Attributes:
        arrived: whose updates the step takes; by end, and by partition where those are equal.
        lost: whose updates do not come, or come too late to be used, with the cause.
        begun: the partitions that were sent the weights.
        seconds: from the step before to this one.
        waiting: the versions, by their numbers, of those that are still at work.
    """

    arrived: Sequence[Flight]
    lost: Sequence[tuple[Flight, str]]
    begun: Sequence[int]
    seconds: float
    waiting: frozenset[int]


def steps(fleet: Fleet, *, concurrency: int, buffer: int, maximum_staleness: int | None) -> Iterator[Step]:
    """The server steps of a run, one after another, without end.

    The server keeps ``concurrency`` clients at work. Where one has ended, it draws another one of those that can be reached, are idle and
    have no update in the buffer, and sends it the newest weights. After ``buffer`` updates it makes a step. Clients that end in the same
    moment are taken in the order of partitions, and all of them before anybody begins.

    Args:
        fleet: the devices.
        concurrency: clients at work at the same time, where so many can be reached.
        buffer: updates of a step, no more than clients that are able.
        maximum_staleness: server steps after which an update is too old; ``None``: never.

    Raises:
        UpdateError: nobody can be reached, or next to no turn ends in an update.
    """
    flying, arrived, lost, begun = list[Flight](), list[Flight](), list[tuple[Flight, str]](), list[int]()
    clock = before = 0.0
    version = asked = 0
    while True:
        for _ in range(TRIES):
            while len(flying) < concurrency:
                asked += 1
                busy = {flight.partition for flight in (*flying, *arrived)}
                partition = _reached(fleet, asked, busy)
                if partition is None:
                    break
                turn = fleet.turn(asked, partition)
                heapq.heappush(flying, Flight(clock + turn.seconds, partition, version, turn))
                begun.append(partition)
            if flying:
                break
        else:
            remedy = "Choose devices with a higher availability."
            raise UpdateError(f"nobody could be reached {TRIES} times in turn", round=version + 1, stage=STAGE, remedy=remedy)
        if len(lost) > TRIES * buffer:
            problem = f"{len(lost)} turns were lost and {len(arrived)} updates of {buffer} came; the last of client {lost[-1][0].partition}"
            remedy = "Raise the deadline or strategy.maximum_staleness, or choose other devices."
            raise UpdateError(f"{problem}: {lost[-1][1]}", round=version + 1, stage=STAGE, remedy=remedy)
        clock, ended = flying[0].end, list[Flight]()
        while flying and flying[0].end == clock:
            ended.append(heapq.heappop(flying))
        for place, flight in enumerate(ended):
            stale = version - flight.version
            if flight.turn.cause is not None:
                lost.append((flight, flight.turn.cause))
            elif maximum_staleness is not None and stale > maximum_staleness:
                lost.append((flight, f"its update is {stale} server steps old, and strategy.maximum_staleness is {maximum_staleness}"))
            else:
                arrived.append(flight)
            if len(arrived) == buffer:
                waiting = frozenset(other.version for other in (*flying, *ended[place + 1 :]))
                yield Step(arrived=arrived, lost=lost, begun=begun, seconds=clock - before, waiting=waiting)
                arrived, lost, begun, before, version = [], [], [], clock, version + 1


def _reached(fleet: Fleet, asked: int, busy: set[int]) -> int | None:
    """A client drawn uniformly of those that are able, idle, and reached when the server asks for the ``asked``-th time."""
    if len(busy) == len(fleet.devices):
        return None
    order = torch.randperm(len(fleet.devices), generator=seeds.generator(fleet.seed, "cohort", asked)).tolist()
    return next((p for p in order if p not in busy and fleet.able(p) and fleet.there(asked, p)), None)
