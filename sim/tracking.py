"""What a run tells TensorBoard and MLflow, through their own libraries.

Each library works in a thread of its own, some seconds behind the run, so neither a slow server nor a full disk holds the run up. One that
fails is told of once and left out from then on; the metrics are in the result folder in any case.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import re
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedimpr.errors import FedimprError
from sim.config import Settings, flat
from sim.curves import points
from sim.results import Status, replace_file

log = logging.getLogger(__name__)

EVERY = 2.0  # seconds between two batches
WAIT = 30.0  # seconds that a run which has ended waits for those that are behind
PICTURES = ("partition.png", "impressions.png")
ENDED = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # in MLflow's words
BATCH = 1000  # metrics in one of MLflow's requests
PARAMETERS = 100  # and parameters


class Scalar(NamedTuple):
    """A number as both libraries take it.

    Attributes:
        name: ``<stage>/<name>`` or ``<stage>/<name>/<series>``.
        value: may be NaN or infinite.
        step: the round; inside a stage its step, counted on from round to round.
        time: seconds since the epoch.
    """

    name: str
    value: float
    step: int
    time: float


def scalars(line: Mapping[str, Any], time: float) -> list[Scalar]:
    """All numbers of a line of the metrics."""
    place = int(line.get("round") or 0)
    if "step" in line:
        place = (max(place, 1) - 1) * int(line.get("total", 0)) + int(line["step"])
    names = ((found, "/".join(filter(None, (found.stage, found.name, found.series)))) for found in points(line))
    return [Scalar(re.sub(r"[^\w.:/ -]", "_", name), found.value, place, time) for found, name in names]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a tracker is told at the beginning.

    Attributes:
        settings: of the run.
        folder: its results.
        resumed: whether it goes on in its own folder.
    """

    settings: Settings
    folder: Path
    resumed: bool


class Tracker(Protocol):
    """Made from a :class:`Run`. All calls come from one thread; an exception ends the tracking and not the run."""

    def log(self, found: Sequence[Scalar]) -> None:
        """Keep some numbers."""

    def close(self, status: Status) -> None:
        """Keep what the ended run has drawn, and end."""


class TensorBoard:
    """Event files in ``<results>/tensorboard``, where a resumed run adds another."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        self.folder = run.folder
        if not run.resumed:
            shutil.rmtree(run.folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(str(run.folder / "tensorboard"))
        rows = "".join(f"| {key} | {json.dumps(value)} |\n" for key, value in flat(json.loads(run.settings.to_json())).items())
        self.writer.add_text("settings", f"| key | value |\n| --- | --- |\n{rows}")

    def log(self, found: Sequence[Scalar]) -> None:
        for name, value, step, when in found:
            self.writer.add_scalar(name, value, step, walltime=when)
        self.writer.flush()

    def close(self, status: Status) -> None:
        import numpy
        from PIL import Image

        for name in PICTURES:
            if (path := self.folder / name).exists():
                self.writer.add_image(path.stem, numpy.asarray(Image.open(path).convert("RGB")), dataformats="HWC")
        self.writer.add_text("status", status)
        self.writer.close()


class MLflow:
    """A run in the store that ``MLFLOW_TRACKING_URI`` names, else in ``mlflow.db`` of the current folder with artifacts in ``mlruns``.

    ``<results>/mlflow.json`` says which one it is, so that a resumed run finds it again.
    """

    def __init__(self, run: Run) -> None:
        import mlflow  # takes a second

        for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # each of a request's attempts would be a warning
            logging.getLogger(name).setLevel(logging.ERROR)
        self.folder, settings, uri = run.folder, run.settings, tracking_uri()
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.run_id, known = "", run.folder / "mlflow.json"
        if run.resumed and known.exists():
            try:
                self.run_id = str(json.loads(known.read_bytes())["run_id"])
                self.client.update_run(self.run_id, status="RUNNING")
                return
            except (mlflow.MlflowException, ValueError, KeyError, TypeError):  # of another store, or deleted there: a run of its own
                pass
        experiment = self.client.get_experiment_by_name(settings.name)
        # MLflow's own place is below the current folder, and that of a server app which Flower starts does not last.
        beside = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns" / settings.name if uri.startswith("sqlite:///") else None
        there = None if beside is None else beside.as_uri()
        key = self.client.create_experiment(settings.name, there) if experiment is None else experiment.experiment_id
        tags = {"config_hash": settings.hash(), "folder": str(run.folder.absolute()), "mlflow.source.name": "fedimpr"}
        self.run_id = self.client.create_run(key, run_name=run.folder.name, tags=tags).info.run_id
        replace_file(known, (json.dumps({"run_id": self.run_id, "tracking_uri": uri}, indent=1) + "\n").encode())
        parameters = [mlflow.entities.Param(name, json.dumps(value)) for name, value in flat(json.loads(settings.to_json())).items()]
        for first in range(0, len(parameters), PARAMETERS):
            self.client.log_batch(self.run_id, params=parameters[first : first + PARAMETERS])

    def log(self, found: Sequence[Scalar]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(1000 * when), step) for name, value, step, when in found]
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + BATCH])

    def close(self, status: Status) -> None:
        for name in ("report.html", *PICTURES):
            if (path := self.folder / name).exists():
                self.client.log_artifact(self.run_id, str(path))
        self.client.set_terminated(self.run_id, ENDED[status])


TRACKERS: Mapping[str, Callable[[Run], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def tracking_uri() -> str:
    """Where MLflow keeps runs: what ``MLFLOW_TRACKING_URI`` says, else a database in the current folder, as MLflow itself has it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def check(names: Iterable[str]) -> None:
    """Look for the libraries before anything starts.

    Raises:
        FedimprError: one of them is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            remedy = f"Install it with: pip install 'fedimpr[{name}]'; or leave {name} out of tracking=[...]."
            raise FedimprError(f"the library {name} is not installed", stage=f"tracking with {name}", remedy=remedy)


class Tracking:
    """Hands the metrics of a run to its trackers; with none it does nothing.

    Args:
        run: whose settings name the trackers.
    """

    def __init__(self, run: Run) -> None:
        self.workers = [_Worker(name, TRACKERS[name], run) for name in dict.fromkeys(run.settings.tracking)]

    def start(self) -> None:
        """Begin; from here on lines are taken."""
        for worker in self.workers:
            worker.start()

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take a line of the metrics; returns at once."""
        for worker in self.workers:
            if worker.is_alive():
                worker.lines.put((time.time(), line))

    def finish(self, status: Status) -> None:
        """End all trackers, and wait for those that are behind, but not for ever."""
        for worker in self.workers:
            worker.status = status
            worker.over.set()
        deadline = time.monotonic() + WAIT
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                log.warning("tracking with %s is still behind %g s after the run, and is given up", worker.name, WAIT)


class _Worker(threading.Thread):
    """One tracker's thread."""

    def __init__(self, name: str, make: Callable[[Run], Tracker], run: Run) -> None:
        super().__init__(name=name, daemon=True)  # a server that never answers does not keep the process alive
        self.make, self.told = make, run
        self.lines: queue.SimpleQueue[tuple[float, Mapping[str, Any]]] = queue.SimpleQueue()
        self.over = threading.Event()
        self.status: Status = "failed"

    def run(self) -> None:
        try:
            tracker, over = self.make(self.told), False
            while not over:
                over = self.over.wait(EVERY)
                if found := [scalar for when, line in self._waiting() for scalar in scalars(line, when)]:
                    tracker.log(found)
            tracker.close(self.status)
        except Exception as error:
            reason = textwrap.shorten(str(error), 300) or type(error).__name__
            log.warning("tracking with %s has ended, and the run goes on without it: %s", self.name, reason)

    def _waiting(self) -> list[tuple[float, Mapping[str, Any]]]:
        return [self.lines.get() for _ in range(self.lines.qsize())]
