"""The server's own work, done by the workers that play the clients: each takes one piece of a round, and the server takes it over.

A worker goes on with the run as a stopped one is gone on with, from the state in the result folder, which it has to see. All updates of
the round are kept there, so no client is asked; and of the pieces it does one, whose end is kept there, too. The server then goes on in
the same way and finds all pieces done. So it makes no difference to the result who did them, and a piece that no worker could finish is
left to the server.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from fedimpr.errors import FedimprError
from fedimpr.states import under
from sim.checkpoint import States
from sim.config import Settings, from_json
from sim.federation import device_of, initial_weights, strategy_of, threads
from sim.grid import LocalGrid
from sim.stages import is_point
from strategies import Nobody
from strategies.crew import Alone, Result
from strategies.keep import answered
from strategies.rounds import run_rounds

WRITE_SECONDS = 0.5  # between two lines of a piece's progress, beside those that become points of a curve

log = logging.getLogger(__name__)


class Errands(Protocol):
    """Workers that do pieces side by side."""

    def do_errands(self, errands: Sequence[tuple[Any, ...]], look: Callable[[], None]) -> list[str | None]:
        """Call :func:`run_errand` with each of these arguments; return why each failed, or nothing. ``look`` is called now and then."""


class Workers:
    """A :class:`strategies.crew.Crew` whose pieces the workers bring to their ends.

    Args:
        workers: that do them.
        settings: of the run.
        progress: told how far they are.
    """

    def __init__(self, workers: Errands, settings: Settings, progress: Callable[..., None]) -> None:
        self.workers, self.settings, self.progress = workers, settings, progress
        self.states = States(settings.folder.resolve(), settings.save_seconds)
        self.told: dict[str, int] = {}  # how far each stage of the round is

    def work(self, round: int, pieces: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
        """As :meth:`strategies.crew.Crew.work`; a single piece is done here."""
        if len(pieces) > 1:
            journals = {piece: self.states.journal(round, piece) for piece in pieces}
            read = {piece: path.stat().st_size if path.exists() else 0 for piece, path in journals.items()}
            self.told = {}

            def look() -> None:
                for piece, path in journals.items():
                    if path.exists():
                        read[piece] += self._tell(path, read[piece])

            device = device_of(self.settings).type
            errands = [(self.settings.to_json(), str(self.states.results), device, round, piece) for piece in pieces]
            for piece, failure in zip(pieces, self.workers.do_errands(errands, look), strict=True):
                if failure is not None:
                    log.warning("no worker finished '%s' (%s); the server goes on with it", piece, failure)
            look()
        return Alone().work(round, pieces)

    def _tell(self, path: Path, start: int) -> int:
        """Tell what a journal says from a place on; return how many bytes that was."""
        with path.open("rb") as file:
            file.seek(start)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]  # the last one may be half written
        for line in lines:
            told = json.loads(line)
            if "warning" in told:
                logging.getLogger(told["logger"]).warning(told["warning"])
            elif told["done"] > self.told.get(told["stage"], -1):  # who takes over from a lost worker does its last steps again
                self.told[told["stage"]] = told["done"]
                self.progress(told.pop("stage"), told.pop("done"), told.pop("total"), **told)
        return sum(map(len, lines))


def run_errand(settings: str, folder: str, device: str, round: int, piece: str) -> None:
    """Bring one piece of a round to its end, on a worker.

    Args:
        settings: of the run, as JSON.
        folder: its result folder.
        device: the kind that the server computes on.
        round: the one that the run is at.
        piece: of the round.

    Raises:
        FedimprError: the worker has no such device, the folder does not hold the updates of the round, or the piece fails.
    """
    run = replace(from_json(settings), output=folder)
    if (own := device_of(run).type) != device:
        remedy = "Set runtime.gpus_per_worker, or runtime.server_work=here."
        raise FedimprError(f"the server computes on {device}, and this worker on {own}", round=round, stage=piece, remedy=remedy)
    states = States(run.folder, run.save_seconds)
    done, state = states.newest()
    if done != round - 1 or not answered(states, round):
        remedy = "Choose an output=<folder> that all nodes of the cluster share, or runtime.server_work=here."
        raise FedimprError("this node does not see the updates of the round", round=round, stage=piece, value=folder, remedy=remedy)
    from sim import client_app

    scribe = _Scribe(states.journal(round, piece))
    with threads(int(run.runtime["threads"])), _heard(scribe), suppress(_Done):
        strategy = strategy_of(run, scribe, states, _Only(piece))
        if done:
            strategy.load_state_dict(under(state, "strategy/"))
        weights = under(state, "global/") or initial_weights(run)
        grid = LocalGrid(client_app.app, run.nodes, {})  # it is asked for its nodes, and for nothing else
        run_rounds(strategy, grid, weights, first=round, last=round, after_round=lambda *_: None)


class _Done(Exception):
    """The piece is done, and the rest of the round is not a worker's."""


class _Only:
    """A crew that does one piece."""

    def __init__(self, piece: str) -> None:
        self.piece = piece

    def work(self, round: int, pieces: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
        """As :meth:`strategies.crew.Crew.work`, but it never returns."""
        pieces[self.piece]()
        raise _Done


class _Scribe(Nobody):
    """Writes progress down, line by line."""

    def __init__(self, path: Path) -> None:
        self.path, self.next = path, 0.0

    def progress(self, stage: str, done: int, total: int, **info: object) -> None:
        """What becomes a point of a curve, and a line now and then."""
        if is_point(done, total) or time.monotonic() >= self.next:
            values = {key: float(value) for key, value in info.items() if isinstance(value, SupportsFloat)}
            self.write({"stage": stage, "done": done, "total": total, **values})
            self.next = time.monotonic() + WRITE_SECONDS

    def write(self, line: Mapping[str, object]) -> None:
        """One line, whole."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class _Ear(logging.Handler):
    """Writes warnings down, too: nobody looks at what a worker prints."""

    def __init__(self, scribe: _Scribe) -> None:
        super().__init__(logging.WARNING)
        self.scribe = scribe

    def emit(self, record: logging.LogRecord) -> None:
        """One line a warning."""
        self.scribe.write({"warning": record.getMessage(), "logger": record.name})


@contextmanager
def _heard(scribe: _Scribe) -> Iterator[None]:
    """The warnings of the block are written down."""
    root, ear = logging.getLogger(), _Ear(scribe)
    root.addHandler(ear)
    try:
        yield
    finally:
        root.removeHandler(ear)
