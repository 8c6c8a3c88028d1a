"""A study's runs side by side, each in a process of its own: one that fails, hangs or takes too much memory takes no other with it."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedimpr.errors import ConfigError
from sim.config import Settings, quoted
from sim.processes import Family
from sim.study.child import play
from sim.study.plan import Point, Study

POLL = 0.05  # seconds between two looks at the runs
LOOK = 1.0  # seconds between two looks at their memory
GUESS_MB = 1024.0  # of a run, until one has ended
FREE_SECONDS = 10.0  # for what a killed study has left behind to be gone


@dataclass
class Active:
    """A run at work; also what :class:`~sim.processes.Family` needs of a process.

    Attributes:
        point: which.
        folder: its result folder.
        process: that plays it.
        gpu: that it sees; ``None`` where there is none.
        memory_mb: of it and all that it started, when last looked at.
    """

    point: Point
    folder: Path
    process: BaseProcess
    gpu: int | None
    started: float = field(default_factory=time.monotonic)
    family: Family = field(default_factory=Family)
    memory_mb: float = 0.0
    cause: str | None = None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit status, or nothing while it is at work."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.process.exitcode

    def terminate(self) -> None:
        """Ask it to stop."""
        self.process.terminate()

    def look(self) -> None:
        """Learn what it has started, and how much memory all of it takes."""
        self.memory_mb = sum(map(_resident_mb, self.family.members()))

    def end(self, cause: str | None) -> None:
        """Ask it and all that it started to stop, then insist."""
        self.cause = cause
        self.family.kill()
        self.process.join()


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keep other studies out of a study's folder for the length of a block.

    Raises:
        ConfigError: one is at work there, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError("study.output", str(folder), f"a folder that can be written to ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("study.output", str(folder), "a folder that no other study is at work in") from None
        yield


def status_of(folder: Path) -> str:
    """``finished``, ``failed``, ``interrupted``, ``running`` (or killed), or ``waiting``."""
    run = read_json(folder / "run.json")
    return str(run.get("status", "waiting")) if isinstance(run, dict) else "waiting"


def read_json(path: Path) -> Any:
    """The file's content, or nothing where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def run_points(study: Study, settings: Settings, points: Iterable[Point], ended: Callable[[Point, int], None]) -> None:
    """Play points side by side, as many as there are cores, memory and GPUs for; return when all have ended.

    Whatever ends this function ends them first; they can be resumed.

    Args:
        study: whose points they are.
        settings: of a run, for the cores that it computes with.
        points: that have not ended.
        ended: told each point that has, and how many are at work.
    """
    waiting, active = deque(points), list[Active]()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sim.study.warm"])
    most, gpus, expected, looked = places(study, settings), _gpus(settings), study.memory_mb or GUESS_MB, 0.0
    try:
        while waiting or active:
            while waiting and len(active) < most and (not active or _room(active, expected)):
                gpu = min(gpus, key=lambda one: sum(run.gpu == one for run in active)) if gpus else None
                if gpu is not None and sum(run.gpu == gpu for run in active) >= study.per_gpu:
                    break
                active.append(_started(study, waiting.popleft(), context, gpu))
            time.sleep(POLL)
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                for run in active:
                    run.look()
            for run in list(active):
                if run.returncode is None:
                    _hold_to_limits(study, run)
                if run.returncode is not None:
                    active.remove(run)
                    _conclude(run)
                    expected = study.memory_mb or max(expected if expected != GUESS_MB else 0.0, _peak_mb(run.folder), 1.0)
                    ended(run.point, len(active))
    finally:
        for run in active:
            run.terminate()  # all at once, so that they save what they have side by side
        for run in active:
            run.end(None)


def places(study: Study, settings: Settings) -> int:
    """How many runs fit side by side: their cores into this machine's, unless the study says how many."""
    if study.workers is not None:
        return study.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runtime = settings.runtime
    if runtime["name"] == "local":
        needed = float(runtime["threads"])
    elif runtime["name"] == "ray" and runtime["workers"] is not None:
        needed = max(float(runtime["threads"]), runtime["workers"] * runtime["cpus_per_worker"])
    else:
        needed = cores  # such a runner takes all there are
    return max(1, int(cores / needed))


def _started(study: Study, point: Point, context: Any, gpu: int | None) -> Active:
    folder = study.folder.resolve() / "points" / point.name
    overrides = [*point.overrides, f"output={quoted(str(folder))}"]
    if status_of(folder) != "waiting" and (folder / "config.yaml").exists():
        _wait_until_free(folder)
        overrides.append(f"resume={quoted(str(folder))}")
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    variables = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    process = context.Process(target=play, args=(overrides, folder, folder / "log.txt", variables), daemon=False)
    process.start()
    run = Active(point, folder, process, gpu)
    run.family.adopt(run)
    return run


def _hold_to_limits(study: Study, run: Active) -> None:
    if study.minutes is not None and time.monotonic() - run.started > 60 * study.minutes:
        run.end(f"it took longer than study.minutes = {study.minutes:g}")
    elif study.memory_mb is not None and run.memory_mb > study.memory_mb:
        run.end(f"it took {run.memory_mb:,.0f} MiB, more than study.memory_mb = {study.memory_mb:g}")


def _conclude(run: Active) -> None:
    """Write down how a run ended that could not do so itself."""
    run.process.join()
    run.family.kill()  # what it has left behind, if anything
    status, code = status_of(run.folder), run.returncode or 0
    if run.cause is None and (status in ("finished", "failed") or code == 143):
        return
    cause = run.cause or _last_words(run.folder / "log.txt")
    if run.cause is None and code < 0:
        cause = f"its process was ended by {signal.Signals(-code).name}" + (
            "; most likely memory ran out" if code == -signal.SIGKILL else ""
        )
    from sim.report import conclude  # PyTorch comes with it

    conclude(run.folder, cause)


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
        with suppress(OSError), (folder / "state" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if not (folder / "state" / "lock").exists():
            return
        time.sleep(POLL)


def _room(active: Iterable[Active], expected_mb: float) -> bool:
    """Whether there is memory for one more, with what those at work may still grow by set aside."""
    growth = sum(max(0.0, expected_mb - run.memory_mb) for run in active)
    return _available_mb() - growth > expected_mb


def _available_mb() -> float:
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) / 1024
        with suppress(OSError, ValueError):  # of a container; "max" where it has no limit
            limit, used = (float(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, (limit - used) / 2**20)
        return free
    return float("inf")


def _resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        return 0.0


def _peak_mb(folder: Path) -> float:
    run = read_json(folder / "run.json")
    found = run.get("peak_memory_mb") if isinstance(run, Mapping) else None
    return float(found) if isinstance(found, int | float) else 0.0


def _gpus(settings: Settings) -> list[int]:
    """The GPUs that runs share; none where they compute on the CPU."""
    if settings.device == "cpu":
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [int(one) for one in chosen.split(",") if one.strip().isdigit()]
    return list(range(len(list(Path("/proc/driver/nvidia/gpus").glob("*")))))
