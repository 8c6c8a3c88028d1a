"""A pool of workers of two kinds: who gets which turn, in rounds that are played on a clock of their own."""

from __future__ import annotations

import pytest

from sim import pool
from sim.pool import Kind, Pool, Turn
from tests.sim.test_pool import FOREVER, Actor, FakeRay


class Clock:
    """Stands in for the module ``time``."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The pool's, on a Ray that is played."""
    clock = Clock()
    monkeypatch.setattr(pool, "ray", FakeRay())
    monkeypatch.setattr(pool, "time", clock)
    return clock


class Machine:
    """Actors of kinds that take their factor times what a turn takes, and a clock that goes from one end of a turn to the next.

    Args:
        clock: the pool's.
        kinds: how many workers of which factor, by name.
        warm_up: seconds that each worker's first turn takes beside.
    """

    def __init__(self, clock: Clock, kinds: dict[str, tuple[int, float]], warm_up: float = 0.0) -> None:
        self.clock, self.factors, self.warm_up = clock, {name: factor for name, (_, factor) in kinds.items()}, warm_up
        self.actors: list[tuple[str, Actor]] = []
        self.ends: dict[Actor, float] = {}
        self.done: list[tuple[str, object]] = []  # by whom, and which
        made = [Kind(name=name, start=lambda name=name: self._start(name), workers=count) for name, (count, _) in kinds.items()]
        self.pool = Pool(made, FOREVER)
        assert self.pool.finished(0.0) == []

    def _start(self, name: str) -> Actor:
        self.actors.append((name, Actor()))
        return self.actors[-1][1]

    def round(self, given: list[Turn]) -> float:
        """Let the turns be done, whose first argument is what they take; the seconds that it takes in all."""
        start, done = self.clock.now, 0
        self.pool.add(given)
        while done < len(given):
            for name, actor in self.actors:
                if actor.turns and actor not in self.ends:
                    cold = 0.0 if any(one is actor for one, _ in self.done) else self.warm_up
                    self.ends[actor] = self.clock.now + cold + self.factors[name] * float(actor.turns[0][0])
            actor = min(self.ends, key=self.ends.__getitem__)
            name = next(name for name, one in self.actors if one is actor)
            took = self.factors[name] * float(actor.turns[0][0]) + (0.0 if any(one is actor for one, _ in self.done) else self.warm_up)
            self.clock.now = self.ends.pop(actor)
            self.done.append((actor, actor.turns[0][0]))
            actor.finish(took)
            done += len(self.pool.finished(0.0))
        return self.clock.now - start


def seen(given: list[Turn]) -> list[Turn]:
    """The same turns a round later."""
    return [Turn(arguments=turn.arguments, predicted=turn.seconds, seen_on=turn.done_on) for turn in given]


def new(works: list[float]) -> list[Turn]:
    return [Turn(arguments=(work,), predicted=None) for work in works]


def test_workers_of_a_slower_kind_get_the_shortest_turns_and_none_that_the_others_would_end_sooner(clock: Clock) -> None:
    """Two fast workers and one that takes four times as long. It has time for the turn of 1 s, which it ends at 4 s, since the others take
    (8 + 6 + 2 + 1) / 2 = 8.5 s; and for none after that."""
    machine = Machine(clock, {"gpu": (2, 1.0), "cpu": (1, 4.0)})
    machine.pool._paces.learn("gpu", 1.0, None, None)
    machine.pool._paces.learn("cpu", 4.0, None, None)
    for worker in machine.pool._workers:
        worker.warm = True
    given = [Turn(arguments=(work,), predicted=work, seen_on="gpu") for work in (1.0, 8.0, 2.0, 6.0)]
    assert machine.round(given) == 8.0
    assert {turn.arguments[0]: turn.done_on for turn in given} == {8.0: "gpu", 6.0: "gpu", 2.0: "gpu", 1.0: "cpu"}


@pytest.mark.parametrize("warm_up", [0.0, 5.0])
@pytest.mark.parametrize("factor", [0.2, 1.0, 2.0, 5.0, 10.0, 50.0])
def test_workers_beside_others_make_rounds_shorter_once_it_is_known_how_slow_they_are(clock: Clock, factor: float, warm_up: float) -> None:
    """A hundred turns of 1 to 3 s on four workers, and on those and four others. At best they take no longer than the works would if they
    could be cut in pieces: the sum over (4 + 4 / factor), and a turn more."""
    works = [1.0 + (i * 7 % 20) / 10 for i in range(100)]
    both = Machine(clock, {"gpu": (4, 1.0), "cpu": (4, factor)}, warm_up)
    given, seconds = new(works), list[float]()
    for _ in range(6):
        seconds.append(both.round(given))
        given = seen(given)
    alone, ideal = sum(works) / 4, sum(works) / (4 + 4 / factor)
    assert seconds[-1] <= ideal + 3.0
    assert seconds[-1] <= alone + 0.5
    # In the first round each of the slow ones tries two turns before its pace is known.
    assert seconds[0] <= alone + 2 * (factor * 3.0 + warm_up)


def test_a_workers_first_turn_tells_nothing_where_there_are_two_kinds(clock: Clock) -> None:
    machine = Machine(clock, {"gpu": (1, 1.0), "cpu": (1, 1.0)}, warm_up=5.0)
    given = new([1.0] * 4)
    machine.round(given)
    assert [turn.seconds for turn in given] == [None, None, 1.0, 1.0]


def test_a_turn_for_one_kind_waits_for_it_and_goes_to_another_where_none_is_left(clock: Clock) -> None:
    machine = Machine(clock, {"gpu": (1, 1.0), "cpu": (1, 1.0)})
    (_, gpu), (_, cpu) = machine.actors
    given = [Turn(arguments=(i,), predicted=None, only="gpu") for i in range(2)]
    machine.pool.add(given)
    assert (gpu.held, cpu.held) == ([0], [])
    gpu.die()
    machine.pool.finished(0.0)  # it is replaced by its like
    machine.pool.finished(0.0)
    (name, third) = machine.actors[2]
    assert name == "gpu" and third.held == [0] and cpu.held == []
    start = machine._start

    def never_up(name: str) -> Actor:
        actor = start(name)
        actor.willing = False
        return actor

    machine._start = never_up  # type: ignore[method-assign]
    third.die()
    machine.pool.finished(0.0)
    assert cpu.held == [] and machine.actors[3][0] == "gpu", "one is on its way"
    clock.now += pool.START_SECONDS + 1
    machine.pool.finished(0.0)
    assert cpu.held == [1], "a worker of the other kind is better than none"
