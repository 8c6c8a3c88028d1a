"""A supervised pool of Ray actors, of one kind or several.

Work is dealt longest first; workers of a slower kind get the shortest, as long as that saves time. A worker that dies or hangs is replaced,
and what it was at goes to another one, once.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError

from fedimpr.errors import FedimprError
from sim.grid import OUT_OF_MEMORY, reason
from sim.paces import Paces

LIVES = 2  # workers that a turn may take along before it is given up
# Turns shorter than this are dealt one ahead, so that a worker need not wait for its next while the server is busy with its last: quick
# ones always, short ones as long as there are enough for all.
QUICK_SECONDS, SHORT_SECONDS = 0.1, 2.0
START_SECONDS = 120.0  # for a worker to come up, or to say that it is still there
STARTS = 3  # workers in a row that end before they are up: the next would, too
LOOK_SECONDS = 0.5  # between two looks at turns that take too long

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """Workers that are alike.

    Attributes:
        name: e.g. ``"gpu"``.
        start: starts one: an actor with the methods ``up()`` and those that turns name, see :class:`Turn`.
        workers: how many, >= 1.
    """

    name: str
    start: Callable[[], Any]
    workers: int


@dataclass(kw_only=True, eq=False)
class Turn:
    """One piece of work.

    Attributes:
        arguments: what the worker's method gets. It returns ``(seconds, result)``; the seconds are those of the work alone.
        predicted: seconds that it will take; ``None`` where nobody knows.
        seen_on: the kind of worker that this prediction is for; ``None``: for any.
        only: the kind of worker that can do it; others may once there is none that is up, or on its way. ``None``: any.
        method: of the worker.
        limited: whether it is taken for hung where it takes long.
        seconds: that it took; ``None`` where that tells nothing, as of a worker's first turn among unlike workers: it gets warm.
        done_on: the kind of worker that did it.
        result: what came back; ``None`` where it failed.
        failure: why it failed, in one line.
        losses: why it lost a worker, each in one line.
    """

    arguments: tuple[Any, ...]
    predicted: float | None
    seen_on: str | None = None
    only: str | None = None
    method: str = "turn"
    limited: bool = True
    seconds: float | None = None
    done_on: str | None = None
    result: Any = None
    failure: str | None = None
    losses: list[str] = field(default_factory=list)


def longest_first(turns: Iterable[Turn], seconds: Callable[[Turn], float | None] = lambda turn: turn.predicted) -> list[Turn]:
    """Turns in the order in which they are dealt: unknown ones in the order given, then the longest first."""
    return sorted(turns, key=lambda turn: float("-inf") if (known := seconds(turn)) is None else -known)


class Pool:
    """Workers that take turns.

    A worker answers its turns in the order in which it got them, so the first without an answer is the one that it was at when it died.
    That one has lost a worker; those behind it have not. After a loss, idle workers have to say that they are still there before they
    get work: otherwise two workers that died together could take the same turn along.

    Args:
        kinds: of the workers, one or several.
        turn_seconds: a turn that takes longer is taken for hung.
    """

    def __init__(self, kinds: Sequence[Kind], turn_seconds: float) -> None:
        self._kinds, self._turn_seconds, self._paces = kinds, turn_seconds, Paces()
        self._waiting: deque[Turn] = deque()
        self._latest: float | None = None  # seconds of the last turn that was answered
        self._failed_starts = 0
        self._killed = killed_for_memory()
        self._workers = [_Worker(kind) for kind in kinds for _ in range(kind.workers)]

    def add(self, turns: Iterable[Turn]) -> None:
        """Take turns on, and deal what can be dealt."""
        waiting = [*self._waiting, *turns]
        self._waiting = deque(longest_first(waiting) if self._alike else longest_first(waiting, self._on_first))
        self._deal()

    def withdraw(self, turn: Turn) -> bool:
        """Forget a turn that no worker has got yet; whether it was one."""
        waits = turn in self._waiting
        if waits:
            self._waiting.remove(turn)
        return waits

    def finished(self, timeout: float) -> list[Turn]:
        """The turns that have ended since the last call, with their result or their failure.

        Args:
            timeout: seconds to wait for the first; the call may return sooner, with none.

        Raises:
            FedimprError: no worker comes up, or Ray has no room for what is sent.
        """
        self._deal()
        awaited = {ref: worker for worker in self._workers if (ref := worker.awaited) is not None}
        if not awaited:
            return []
        with one_line():
            ready, rest = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
            if not ready and timeout > 0:
                ready, rest = ray.wait(list(awaited), num_returns=1, timeout=min(timeout, LOOK_SECONDS))
        ended = [turn for ref in ready for turn in self._hear(awaited[ref])]
        ended += [turn for ref in rest for turn in self._doubt(awaited[ref])]
        self._deal()
        return ended

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _deal(self) -> None:
        for depth in (0, 1):
            for worker in self._workers:
                if (
                    self._waiting
                    and worker.asked is None
                    and len(worker.turns) == depth
                    and (depth == 0 or self._ahead(worker.turns[0][0]))
                    and (place := self._place(worker)) is not None
                ):
                    turn = self._waiting[place]
                    del self._waiting[place]
                    worker.deal(turn)

    def _place(self, worker: _Worker) -> int | None:
        """Where in the line the turn stands that a worker should take: the first that it can. Where it is of a slower kind, the last, and
        none at all where the fastest ones will be through with all that waits before it would be with that one.
        """
        if self._alike and self._waiting[0].only is None:
            return 0
        line = range(len(self._waiting))
        first = next((i for i in line if self._can(worker, self._waiting[i])), None)
        fastest = self._paces.faster_than(worker.kind.name)
        fast = [other for other in self._workers if other.kind.name == fastest and other.known]
        if first is None or fastest is None or not fast or self._waiting[first].only is not None:
            return first
        last = next(i for i in reversed(line) if self._can(worker, self._waiting[i]))
        own = self._left(worker) + self._seconds(self._waiting[last], worker.kind.name)
        theirs = sum(map(self._left, fast)) + sum(self._seconds(turn, fastest) for turn in self._waiting)
        return last if own <= theirs / len(fast) else None

    @property
    def _alike(self) -> bool:
        return len(self._kinds) == 1

    def _on_first(self, turn: Turn) -> float | None:
        """What a turn will take on the first kind; what it took on another one, where nobody knows."""
        known = turn.predicted
        return known if known is None else self._paces.seconds(self._kinds[0].name, known, turn.seen_on) or known

    def _can(self, worker: _Worker, turn: Turn) -> bool:
        """Whether a worker may take a turn."""
        return turn.only in (None, worker.kind.name) or not any(
            other.kind.name == turn.only and (other.known or time.monotonic() - other.since < START_SECONDS) for other in self._workers
        )

    def _seconds(self, turn: Turn, kind: str) -> float:
        """What a turn will take on a kind; nothing where nobody knows."""
        return self._paces.seconds(kind, turn.predicted, turn.seen_on) or 0.0

    def _left(self, worker: _Worker) -> float:
        """Seconds that a worker will still be at what it has."""
        seconds = sum(self._seconds(turn, worker.kind.name) for turn, _ in worker.turns)
        return max(0.0, seconds - (time.monotonic() - worker.since)) if worker.turns else 0.0

    def _ahead(self, turn: Turn) -> bool:
        """Whether the next turn may wait behind this one."""
        seconds = self._latest if turn.predicted is None else turn.predicted
        many = len(self._waiting) > len(self._workers)
        return seconds is not None and seconds < (SHORT_SECONDS if many else QUICK_SECONDS)

    def _hear(self, worker: _Worker) -> list[Turn]:
        """Take in what a worker has to say."""
        try:
            with one_line():
                said = ray.get(worker.awaited)
        except RayError as error:
            # What a worker raises itself leaves it alive, unless it could not fetch what it was sent: that went with another node. One that
            # ran out of memory is alive as well, but a fresh process may have more to begin with.
            if isinstance(error, RayTaskError) and isinstance(error.cause, MemoryError):
                return self._lose(worker, str(error.cause))
            if not isinstance(error, RayTaskError) or isinstance(error, ObjectLostError):
                return self._lose(worker, self._blamed(cause(error)))
            said, worker.turns[0][0].failure = (None, None), reason(error.cause)
        worker.since = time.monotonic()
        if worker.asked is not None:
            worker.asked, worker.known, self._failed_starts = None, True, 0
            return []
        turn, _ = worker.turns.popleft()
        turn.seconds, turn.result = said
        turn.done_on, self._latest = worker.kind.name, turn.seconds
        if turn.seconds is not None and not self._alike:
            if worker.warm:
                turn.seconds = max(turn.seconds, 1e-6)
                self._paces.learn(worker.kind.name, turn.seconds, turn.predicted, turn.seen_on)
            else:
                turn.seconds, worker.warm = None, True
        return [turn]

    def _blamed(self, why: str) -> str:
        """Why a worker died, with the kernel's part in it: of a process that was killed for its memory nobody else says so."""
        before, self._killed = self._killed, killed_for_memory()
        return f"{OUT_OF_MEMORY}: the kernel has killed a process of this machine for it ({why})" if self._killed > before else why

    def _doubt(self, worker: _Worker) -> list[Turn]:
        """Give up a worker that has been silent for too long."""
        silent = time.monotonic() - worker.since
        if worker.asked is None and worker.turns[0][0].limited and silent > self._turn_seconds:
            return self._lose(worker, f"a turn took longer than {self._turn_seconds:g} s")
        if worker.known and worker.asked is not None and silent > START_SECONDS:
            return self._lose(worker, f"no sign of life for {START_SECONDS:g} s")
        if silent > START_SECONDS and not any(other.known for other in self._workers):
            raise FedimprError(
                f"no worker has come up within {START_SECONDS:g} s",
                stage="starting Ray's workers",
                remedy="Look at `ray status`: the cluster may be busy, or have lost nodes.",
            )
        return []

    def _lose(self, worker: _Worker, why: str) -> list[Turn]:
        """Replace a worker, hand its turns on, and return the one that is given up, if any."""
        log.warning("a worker is lost and replaced: %s", why)
        self._workers.remove(worker)
        worker.kill()
        self._failed_starts += not worker.known
        if self._failed_starts >= STARTS:
            remedy = "Every node needs this release of fedimpr and its dependencies, in the same Python."
            raise FedimprError(f"{STARTS} workers in a row did not come up: {why}", stage="starting Ray's workers", remedy=remedy)
        turns = [turn for turn, _ in worker.turns]
        given_up = []
        if turns:
            turns[0].losses.append(why)
            if len(turns[0].losses) == LIVES:
                given_up.append(turns.pop(0))
        self._waiting.extendleft(reversed(turns))
        for other in self._workers:
            if other.awaited is None:
                other.ask()
        self._workers.append(_Worker(worker.kind))
        for turn in given_up:
            turn.failure = "the worker died twice: " + " and then: ".join(dict.fromkeys(turn.losses))
        return given_up


class _Worker:
    """An actor and what it was asked for."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.actor = kind, kind.start()
        self.known = False  # whether it has ever been up
        self.warm = False  # whether it has ever done a turn
        self.asked: Any = None  # whether it is up; nothing, where it has answered
        self.turns: deque[tuple[Turn, Any]] = deque()
        self.since = 0.0  # when it last began something, by the monotonic clock
        self.ask()

    @property
    def awaited(self) -> Any:
        """The answer that has to come next; nothing, where it is idle."""
        return self.asked if self.asked is not None else self.turns[0][1] if self.turns else None

    def ask(self) -> None:
        self.asked, self.since = self.actor.up.remote(), time.monotonic()

    def deal(self, turn: Turn) -> None:
        if not self.turns:
            self.since = time.monotonic()
        with one_line():
            self.turns.append((turn, getattr(self.actor, turn.method).remote(*turn.arguments)))

    def kill(self) -> None:
        with suppress(RayError, ValueError):
            ray.kill(self.actor, no_restart=True)


@contextmanager
def one_line() -> Iterator[None]:
    """What Ray says where it runs out of room becomes one line, and a signal that arrives inside of Ray is what its handler raises.

    Raises:
        FedimprError: the object store is full, or the disk that it spills to.
    """
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        what = "the disk that Ray spills to" if isinstance(error, OutOfDiskError) else "Ray's object store"
        remedy = "Free some space, give Ray a larger object store (ray start --object-store-memory), or lower runtime.workers."
        raise FedimprError(f"{what} is full", stage="sending models between server and workers", remedy=remedy) from error
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def killed_for_memory() -> int:
    """How many processes the kernel of this machine has ever killed to get memory back; 0 where it does not say."""
    with suppress(OSError):
        if found := re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE):
            return int(found[1])
    return 0


def cause(error: BaseException) -> str:
    """Why a worker is gone, in one short line."""
    text = str(error).strip()
    if isinstance(error, OutOfMemoryError):
        used = re.search(r"was ([\d.]+GB / [\d.]+GB)", text)
        return f"its node ran low on memory ({used[1] if used else 'how low is not known'})"
    if getattr(error, "actor_init_failed", False):
        return text.splitlines()[-1].strip()
    if found := re.search(r"Worker exit detail: (.*?)\s*(Some common causes|There are some potential|$)", text, re.DOTALL):
        return " ".join(found[1].split()).rstrip(".")
    lines = [line for line in text.splitlines() if line and not line.startswith(("\t", "To see information"))]
    return " ".join(lines[-1].split()).rstrip(".") if lines else type(error).__name__
