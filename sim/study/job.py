"""One run of a study at work: a process of its own, and all that it starts."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from sim.processes import Family
from sim.study.child import play

LOOK = 1.0  # seconds between two looks at the memory


@dataclass
class Job:
    """A process that plays a run; for :class:`~sim.processes.Family` it is one of its processes.

    Attributes:
        process: that plays it.
        started: ``time.monotonic()``.
        memory_mb: of it and all that it started, when last looked at.
        cause: why it was ended, if it was.
    """

    process: BaseProcess
    started: float = field(default_factory=time.monotonic)
    family: Family = field(default_factory=Family)
    memory_mb: float = 0.0
    cause: str | None = None
    looked: float = 0.0

    def __post_init__(self) -> None:
        self.family.adopt(self)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid or 0

    def poll(self) -> int | None:
        """Its exit status, or nothing while it is at work."""
        return self.process.exitcode

    def terminate(self) -> None:
        """Ask it to stop."""
        self.process.terminate()

    def hold_to(self, minutes: float | None, memory_mb: float | None) -> None:
        """End it where it takes longer, or more memory."""
        if minutes is not None and time.monotonic() - self.started > 60 * minutes:
            self.end(f"it took longer than study.minutes = {minutes:g}")
        elif time.monotonic() - self.looked > LOOK:
            self.looked = time.monotonic()
            self.memory_mb = sum(map(_resident_mb, self.family.members()))
            if memory_mb is not None and self.memory_mb > memory_mb:
                self.end(f"it took {self.memory_mb:,.0f} MiB, more than study.memory_mb = {memory_mb:g}")

    def end(self, cause: str | None) -> None:
        """Ask it and all that it started to stop, then insist."""
        self.cause = cause
        self.close()

    def close(self) -> None:
        """End what it has left behind, and forget it."""
        self.family.kill()
        self.process.join()


def warm() -> None:
    """Let the process that runs are forked from begin to import what they need; returns at once."""
    forkserver.set_forkserver_preload(["sim.study.warm"])
    forkserver.ensure_running()


def start(overrides: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Job:
    """Play a run in a process forked from one that has imported everything.

    Args:
        overrides: with the result folder.
        folder: the result folder, which also gets ``log.txt``.
        variables: of the environment.
    """
    warm()
    process = multiprocessing.get_context("forkserver").Process(
        target=play, args=(list(overrides), folder / "log.txt", dict(variables)), daemon=False
    )
    process.start()
    return Job(process)


def _resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        return 0.0
