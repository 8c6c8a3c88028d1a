"""The pool's supervision, on actors that are played by hand: what is dealt when, who is to blame, and what is given up."""

from __future__ import annotations

import time
from collections import deque

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, ObjectStoreFullError, OutOfDiskError, RayTaskError

from fedimpr.errors import FedimprError
from sim import pool
from sim.pool import Kind, Pool, Turn, cause, longest_first

FOREVER = 1000.0


class Reference:
    """What a call of an actor returns: answered later, with a value or an error."""

    def __init__(self) -> None:
        self.answered, self.value = False, None

    def answer(self, value: object) -> None:
        self.answered, self.value = True, value


class Call:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *arguments: object) -> Reference:
        reference = Reference()
        if self.actor.dead:
            reference.answer(died())
        elif self.name == "up" and self.actor.willing:
            reference.answer(None)
        elif self.name == "turn":
            self.actor.turns.append((arguments[0], reference))
        return reference


class Actor:
    """Comes up at once where it is willing; its turns are answered by hand."""

    def __init__(self, willing: bool = True) -> None:
        self.willing, self.dead, self.killed = willing, False, False
        self.turns: deque[tuple[object, Reference]] = deque()
        self.up, self.turn = Call(self, "up"), Call(self, "turn")

    @property
    def held(self) -> list[object]:
        return [name for name, _ in self.turns]

    def finish(self, seconds: float = 1.0) -> None:
        name, reference = self.turns.popleft()
        reference.answer((seconds, f"{name} done"))

    def die(self) -> None:
        self.dead = True
        for _, reference in self.turns:
            reference.answer(died())


def died(detail: str = "Worker exits with an exit code 3.") -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = (
        f"The actor died.\n\tactor_id: 7\nWorker exit type: SYSTEM_ERROR Worker exit detail: {detail} Some common causes include: (1) ..."
    )
    return error


class FakeRay:
    """The three functions of Ray that the pool calls."""

    def wait(self, references: list[Reference], *, num_returns: int, timeout: float) -> tuple[list[Reference], list[Reference]]:
        return [one for one in references if one.answered][:num_returns], [one for one in references if not one.answered]

    def get(self, reference: Reference) -> object:
        assert reference.answered
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, actor: Actor, *, no_restart: bool) -> None:
        actor.killed = True


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """All that a test's pool has started, in order."""
    monkeypatch.setattr(pool, "ray", FakeRay())
    return []


def started(actors: list[Actor], workers: int, *, willing: bool = True, turn_seconds: float = FOREVER) -> Pool:
    """A pool whose workers are up."""

    def start() -> Actor:
        actors.append(Actor(willing))
        return actors[-1]

    made = Pool([Kind(name="cpu", start=start, workers=workers)], turn_seconds)
    assert made.finished(0.0) == []
    return made


def turns(names: str, predicted: float | None = None) -> list[Turn]:
    return [Turn(arguments=(name,), predicted=predicted) for name in names]


def test_unknown_turns_are_dealt_in_the_order_given_and_then_the_longest_first() -> None:
    seconds = {"a": 1.0, "b": None, "c": 3.0, "d": None, "e": 3.0, "f": 2.0}
    given = [Turn(arguments=(name,), predicted=predicted) for name, predicted in seconds.items()]
    assert "".join(turn.arguments[0] for turn in longest_first(given)) == "bdcefa"


def test_idle_workers_get_the_next_turn_and_long_turns_are_not_dealt_ahead(actors: list[Actor]) -> None:
    work = started(actors, 2)
    given = turns("abcd", predicted=1.0)
    work.add(given)
    assert [actor.held for actor in actors] == [["a"], ["b"]]
    actors[1].finish(0.5)
    (ended,) = work.finished(0.0)
    assert ended is given[1] and ended.result == "b done" and ended.seconds == 0.5 and ended.failure is None
    assert [actor.held for actor in actors] == [["a"], ["c"]]


def test_quick_turns_are_dealt_one_ahead(actors: list[Actor]) -> None:
    work = started(actors, 2)
    work.add(turns("abcde", predicted=0.01))
    assert [actor.held for actor in actors] == [["a", "c"], ["b", "d"]]


def test_short_turns_are_dealt_ahead_while_enough_are_left_for_all(actors: list[Actor]) -> None:
    work = started(actors, 2)
    work.add(turns("abcdefg", predicted=1.0))
    assert [actor.held for actor in actors] == [["a", "c"], ["b", "d"]]
    for place in (0, 1):
        actors[place].finish(1.0)
        work.finished(0.0)
    assert [actor.held for actor in actors] == [["c", "e"], ["d"]]


def test_without_a_prediction_the_last_turn_tells_whether_turns_are_quick(actors: list[Actor]) -> None:
    work = started(actors, 1)
    work.add(turns("abcde"))
    assert actors[0].held == ["a"]
    actors[0].finish(0.01)
    work.finished(0.0)
    assert actors[0].held == ["b", "c"]
    actors[0].finish(5.0)
    work.finished(0.0)
    assert actors[0].held == ["c"]


def test_nothing_is_dealt_to_a_worker_that_is_not_up(actors: list[Actor]) -> None:
    work = started(actors, 2, willing=False)
    work.add(turns("a"))
    assert [actor.held for actor in actors] == [[], []]


def test_a_dead_worker_is_replaced_and_the_turn_it_was_at_is_done_by_another(actors: list[Actor]) -> None:
    work = started(actors, 1)
    (turn,) = turns("a")
    work.add([turn])
    actors[0].die()
    assert work.finished(0.0) == [] and actors[0].killed
    assert work.finished(0.0) == [] and actors[1].held == ["a"]
    actors[1].finish()
    assert work.finished(0.0) == [turn] and turn.result == "a done" and turn.losses == ["Worker exits with an exit code 3"]


def test_a_turn_that_takes_two_workers_along_is_given_up_and_the_one_behind_it_is_not(actors: list[Actor]) -> None:
    work = started(actors, 1)
    bad, good = turns("xa", predicted=0.01)
    work.add([bad, good])
    for actor in (0, 1):
        assert actors[actor].held == ["x", "a"]
        actors[actor].die()
        ended = work.finished(0.0)
        work.finished(0.0)
    assert ended == [bad] and bad.result is None
    assert bad.failure == "the worker died twice: Worker exits with an exit code 3"
    assert good.losses == [] and actors[2].held == ["a"]
    actors[2].finish()
    assert work.finished(0.0) == [good]


def test_two_different_causes_are_both_told(actors: list[Actor]) -> None:
    work = started(actors, 1, turn_seconds=0.01)
    (turn,) = turns("a")
    work.add([turn])
    actors[0].die()
    work.finished(0.0), work.finished(0.0)
    time.sleep(0.02)
    assert work.finished(0.0) == [turn]
    assert turn.failure == "the worker died twice: Worker exits with an exit code 3 and then: a turn took longer than 0.01 s"


def test_an_idle_worker_has_to_say_that_it_lives_after_a_loss(actors: list[Actor]) -> None:
    """Two workers die together, one of them idle: the turn must not be dealt to that one."""
    work = started(actors, 2)
    (turn,) = turns("a")
    work.add([turn])
    for actor in actors[:2]:
        actor.die()
    work.finished(0.0)  # the first is missed, and the second is asked; the third starts
    work.finished(0.0)
    assert [actor.killed for actor in actors] == [True, True, False, False]
    assert len(turn.losses) == 1 and [actor.held for actor in actors[2:]] == [["a"], []]


def test_a_hung_worker_is_killed_and_its_turns_go_to_another(actors: list[Actor]) -> None:
    work = started(actors, 1, turn_seconds=0.05)
    bad, good = turns("xa", predicted=0.01)
    work.add([bad, good])
    assert work.finished(0.0) == [] and not actors[0].killed
    time.sleep(0.06)
    assert work.finished(0.0) == [] and actors[0].killed
    work.finished(0.0)
    assert actors[1].held == ["x", "a"] and bad.losses == ["a turn took longer than 0.05 s"] and good.losses == []


def test_each_turn_has_the_whole_time_however_long_it_waited_behind_another(actors: list[Actor]) -> None:
    work = started(actors, 1, turn_seconds=0.2)
    work.add(turns("ab", predicted=0.01))
    time.sleep(0.15)
    actors[0].finish()
    work.finished(0.0)
    time.sleep(0.15)  # 0.3 s after it was dealt, 0.15 s after it began
    work.finished(0.0)
    assert not actors[0].killed
    time.sleep(0.1)
    work.finished(0.0)
    assert actors[0].killed


def test_what_a_worker_raises_is_the_turns_failure_and_costs_no_worker(actors: list[Actor]) -> None:
    work = started(actors, 1)
    (turn,) = turns("a")
    work.add([turn])
    actors[0].turns.popleft()[1].answer(RayTaskError("turn", "a traceback", ValueError("cannot\nbe pickled")))
    assert work.finished(0.0) == [turn] and turn.failure == "ValueError: cannot be pickled"
    assert not actors[0].killed and turn.losses == []


def test_a_worker_that_ran_out_of_memory_is_replaced_and_a_fresh_one_tries_again_once(actors: list[Actor]) -> None:
    work = started(actors, 1)
    bad, good = turns("xa", predicted=0.01)
    work.add([bad, good])
    for actor in (0, 1):
        actors[actor].turns.popleft()[1].answer(RayTaskError("turn", "a traceback", MemoryError("out of memory: 16.0 GiB more")))
        ended = work.finished(0.0)
        work.finished(0.0)
    assert actors[0].killed and actors[1].killed and ended == [bad]
    assert bad.failure == "the worker died twice: out of memory: 16.0 GiB more"
    assert good.losses == [] and actors[2].held == ["a"]


def test_a_worker_that_the_kernel_killed_for_memory_is_told_from_others(actors: list[Actor], monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [7]
    monkeypatch.setattr(pool, "killed_for_memory", lambda: killed[0])
    work = started(actors, 1)
    (turn,) = turns("a")
    work.add([turn])
    actors[0].die()
    work.finished(0.0), work.finished(0.0)
    killed[0] += 1
    actors[1].die()
    assert work.finished(0.0) == [turn]
    assert turn.failure == (
        "the worker died twice: Worker exits with an exit code 3 and then: "
        "out of memory: the kernel has killed a process of this machine for it (Worker exits with an exit code 3)"
    )


def test_a_reply_that_was_lost_with_its_node_is_made_again(actors: list[Actor]) -> None:
    work = started(actors, 1)
    (turn,) = turns("a")
    work.add([turn])
    actors[0].turns.popleft()[1].answer(ObjectLostError("ab12", None, ""))
    assert work.finished(0.0) == [] and len(turn.losses) == 1
    work.finished(0.0)
    assert actors[1].held == ["a"]


def test_workers_that_never_come_up_end_the_run(actors: list[Actor]) -> None:
    """Three in a row are enough: the first two are replaced."""

    def start() -> Actor:
        actors.append(Actor())
        actors[-1].dead = True
        return actors[-1]

    work = Pool([Kind(name="cpu", start=start, workers=1)], FOREVER)
    assert work.finished(0.0) == [] and work.finished(0.0) == []
    with pytest.raises(FedimprError, match="^starting Ray's workers: 3 workers in a row did not come up: Worker exits with an exit code 3"):
        work.finished(0.0)
    assert len(actors) == 3


def test_a_cluster_without_room_ends_the_run(actors: list[Actor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "START_SECONDS", 0.01)
    work = started(actors, 1, willing=False)
    time.sleep(0.02)
    with pytest.raises(FedimprError, match="no worker has come up within 0.01 s. Look at `ray status`"):
        work.finished(0.0)


@pytest.mark.parametrize(
    ("error", "place"), [(ObjectStoreFullError, "Ray's object store"), (OutOfDiskError, "the disk that Ray spills to")]
)
def test_a_full_store_is_one_line(actors: list[Actor], error: type[Exception], place: str) -> None:
    work = started(actors, 1)
    work.add(turns("a"))
    actors[0].turns.popleft()[1].answer(error("many\nlines"))
    with pytest.raises(FedimprError, match=f"^sending models between server and workers: {place} is full. Free some space, [^\n]*$"):
        work.finished(0.0)


def test_a_turn_can_be_withdrawn_until_it_is_dealt(actors: list[Actor]) -> None:
    work = started(actors, 1)
    dealt, waiting = turns("ab", predicted=1.0)
    work.add([dealt, waiting])
    assert work.withdraw(waiting) and not work.withdraw(dealt)
    actors[0].finish()
    assert work.finished(0.0) == [dealt] and actors[0].held == []


def test_closing_kills_every_worker(actors: list[Actor]) -> None:
    work = started(actors, 2)
    work.add(turns("abc", predicted=0.01))
    work.close()
    assert [actor.killed for actor in actors] == [True, True] and work.finished(0.0) == []


def test_ten_thousand_words_of_ray_become_a_cause() -> None:
    assert cause(died("Worker unexpectedly exits with a connection error code 2. End of file.")) == (
        "Worker unexpectedly exits with a connection error code 2. End of file"
    )
    failed = ActorDiedError()
    failed.error_msg = "The actor died.\n\tpid: 7\nThe actor is dead because it was killed by `ray.kill`."
    assert cause(failed) == "The actor is dead because it was killed by `ray.kill`"
    failed._actor_init_failed = True
    failed.error_msg = "The actor died because of an error.\n  File x\nModuleNotFoundError: No module named 'sim'"
    assert cause(failed) == "ModuleNotFoundError: No module named 'sim'"
