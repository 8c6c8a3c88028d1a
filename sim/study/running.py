"""A study's runs side by side, each in a process of its own: one that fails, hangs or takes too much memory takes no other with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedimpr.errors import ConfigError
from sim.config import Settings, quoted
from sim.html import read
from sim.locks import locked
from sim.study.job import Job, start
from sim.study.plan import Point, Study

if TYPE_CHECKING:  # Ray takes seconds to import
    from sim.study.cluster import RemoteJob

POLL = 0.05  # seconds between two looks at the runs
GUESS_MB = 1024.0  # of a run, until one has ended
FREE_SECONDS = 10.0  # for what a killed study has left behind to be gone


@dataclass
class Active:
    """A point at work.

    Attributes:
        point: which.
        folder: its result folder.
        job: that plays it, here or on a cluster.
        gpu: that it sees, of this machine's; ``None`` without one.
    """

    point: Point
    folder: Path
    job: Job | RemoteJob
    gpu: int | None


def status_of(folder: Path) -> str:
    """``finished``, ``failed``, ``interrupted``, ``running`` (or killed), or ``waiting``."""
    run = read(folder / "run.json", json.loads)
    return str(run.get("status", "waiting")) if isinstance(run, dict) else "waiting"


def run_points(study: Study, settings: Settings, points: Iterable[Point], ended: Callable[[Point, int], None]) -> None:
    """Play points side by side, as many as there are cores, memory and GPUs for; return when all have ended.

    Whatever ends this function ends them first; they can be resumed.

    Args:
        study: whose points they are.
        settings: of a run, for the cores that it computes with.
        points: that have not ended.
        ended: told each point that has, and how many are at work.
    """
    waiting, active, expected = deque(points), list[Active](), study.memory_mb or GUESS_MB
    with _place(study, settings) as place:
        try:
            while waiting or active:
                while waiting and place.room(active, expected):
                    active.append(place.start(waiting.popleft(), active))
                time.sleep(POLL)
                for run in list(active):
                    if run.job.poll() is None:
                        run.job.hold_to(study.minutes, study.memory_mb)
                    if (code := run.job.poll()) is not None:
                        active.remove(run)
                        run.job.close()
                        _conclude(run.folder, code, run.job.cause)
                        expected = study.memory_mb or max(expected if expected != GUESS_MB else 0.0, _peak_mb(run.folder), 1.0)
                        ended(run.point, len(active))
        finally:
            for run in active:
                run.job.terminate()  # all at once, so that they save what they have side by side
            for run in active:
                run.job.end(None)


class Here:
    """This machine.

    Args:
        study: whose runs it plays.
        settings: of a run.
    """

    def __init__(self, study: Study, settings: Settings) -> None:
        self.study, self.most, self.gpus = study, places(study, settings, cores_here()), _gpus(settings)

    def room(self, active: Sequence[Active], expected_mb: float) -> bool:
        """Whether one more fits beside those at work, each of which may take so much memory."""
        if self.gpus and len(active) >= self.study.per_gpu * len(self.gpus):
            return False
        growth = sum(max(0.0, expected_mb - run.job.memory_mb) for run in active)
        return len(active) < self.most and (not active or _available_mb() - growth > expected_mb)

    def start(self, point: Point, active: Sequence[Active]) -> Active:
        """Play a point, on the GPU with the fewest runs."""
        gpu = min(self.gpus, key=lambda one: sum(run.gpu == one for run in active)) if self.gpus else None
        folder, overrides = _prepared(self.study, point)
        return Active(point, folder, start(overrides, folder, {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}), gpu)


class OnRay:
    """A Ray cluster, which sees to it that runs have the cores, the memory and the GPUs that they ask for.

    Args:
        study: whose runs it plays.
        settings: of a run.
    """

    def __init__(self, study: Study, settings: Settings) -> None:
        import ray

        has = ray.cluster_resources()
        self.study, self.most = study, places(study, settings, has.get("CPU", 0.0))
        self.cpus = cores_of(settings, has.get("CPU", 0.0))
        self.gpus = 1 / study.per_gpu if has.get("GPU") and settings.device != "cpu" else 0.0

    def room(self, active: Sequence[Active], expected_mb: float) -> bool:
        """Whether one more is handed in."""
        return len(active) < self.most

    def start(self, point: Point, active: Sequence[Active]) -> Active:
        """Hand a point in."""
        from sim.study.cluster import start_remote

        folder, overrides = _prepared(self.study, point)
        limits = {"minutes": self.study.minutes, "memory_mb": self.study.memory_mb}
        return Active(point, folder, start_remote(overrides, folder, {}, cpus=self.cpus, gpus=self.gpus, **limits), None)


@contextmanager
def _place(study: Study, settings: Settings) -> Iterator[Here | OnRay]:
    if study.address is None:
        yield Here(study, settings)
        return
    from sim.on_ray import running

    with running(study.address, {}):
        yield OnRay(study, settings)


def places(study: Study, settings: Settings, cores: float) -> int:
    """How many runs fit side by side into so many cores, unless the study says how many."""
    return study.workers or max(1, int(cores / cores_of(settings, cores)))


def cores_of(settings: Settings, cores: float) -> float:
    """How many of these cores a run computes with."""
    runtime = settings.runtime
    if runtime["name"] == "local":
        return float(max(runtime["threads"], settings.client_threads))
    if runtime["name"] == "ray" and None not in (runtime["workers"], runtime["cpu_workers"]):
        return float(max(runtime["threads"], (runtime["workers"] + runtime["cpu_workers"]) * runtime["cpus_per_worker"]))
    return max(cores, 1.0)  # such a runner takes all there are


def cores_here() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepared(study: Study, point: Point) -> tuple[Path, list[str]]:
    """A point's result folder, and its overrides with that; a run that was under way resumes."""
    folder = study.folder.resolve() / "points" / point.name
    overrides = [*point.overrides, f"output={quoted(str(folder))}"]
    if status_of(folder) != "waiting" and (folder / "config.yaml").exists():
        _wait_until_free(folder)
        overrides.append(f"resume={quoted(str(folder))}")
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, overrides


def _conclude(folder: Path, code: int, cause: str | None) -> None:
    """Write down how a run ended that could not do so itself."""
    if cause is None and (status_of(folder) in ("finished", "failed") or code == 143):
        return
    if cause is None and code < 0:
        cause = f"its process was ended by {signal.Signals(-code).name}"
        cause += "; most likely memory ran out" if code == -signal.SIGKILL else ""
    from sim.report import conclude  # PyTorch comes with it

    conclude(folder, cause or _last_words(folder / "log.txt"))


def _last_words(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    found = next(
        (line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "its process ended without a word"
    )
    return found.removeprefix("error: ")


def _wait_until_free(folder: Path) -> None:
    """Until the run of a study that was killed a moment ago has let its folder go."""
    deadline = time.monotonic() + FREE_SECONDS
    while time.monotonic() < deadline:
        with suppress(ConfigError), locked(folder / "state" / "lock", "study.output", folder, "run"):
            return
        time.sleep(POLL)


def _available_mb() -> float:
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) / 1024
        with suppress(OSError, ValueError):  # of a container; "max" where it has no limit
            limit, used = (float(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, (limit - used) / 2**20)
        return free
    return float("inf")


def _peak_mb(folder: Path) -> float:
    run = read(folder / "run.json", json.loads)
    found = run.get("peak_memory_mb") if isinstance(run, Mapping) else None
    return float(found) if isinstance(found, int | float) else 0.0


def _gpus(settings: Settings) -> list[int]:
    """The GPUs that runs share; none where they compute on the CPU."""
    if settings.device == "cpu":
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [int(one) for one in chosen.split(",") if one.strip().isdigit()]
    return list(range(len(list(Path("/proc/driver/nvidia/gpus").glob("*")))))
