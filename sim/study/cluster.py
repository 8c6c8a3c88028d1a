"""Runs of a study as tasks of a Ray cluster, whose nodes see the study's folder under the same path."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError

from sim.study.job import start

POLL = 0.2  # seconds between two looks at a run


@dataclass
class RemoteJob:
    """A task that plays a run on some node.

    Attributes:
        ref: of what the task returns: exit status and cause.
        cause: why it was ended, if it was.
        memory_mb: unknown here: Ray packs by what a run may take.
    """

    ref: Any
    cause: str | None = None
    memory_mb: float = 0.0
    ended: int | None = None

    def poll(self) -> int | None:
        """The run's exit status, or nothing while it is at work."""
        if self.ended is None and ray.wait([self.ref], timeout=0)[0]:
            try:
                self.ended, self.cause = ray.get(self.ref)
            except OutOfMemoryError:
                self.ended, self.cause = 1, "its node ran out of memory"
            except RayError as error:
                self.ended, self.cause = 1, self.cause or f"its node or its worker was lost ({type(error).__name__})"
        return self.ended

    def hold_to(self, minutes: float | None, memory_mb: float | None) -> None:
        """Nothing: that is done where the run is."""

    def terminate(self) -> None:
        """Ask it to stop."""
        ray.cancel(self.ref, force=True)

    def end(self, cause: str | None) -> None:
        """Have it stopped."""
        self.cause = cause
        self.terminate()
        self.close()

    def close(self) -> None:
        """Wait until it is gone."""
        ray.wait([self.ref], timeout=30)


def start_remote(
    overrides: Sequence[str], folder: Path, variables: Mapping[str, str], *, cpus: float, gpus: float, minutes: float | None,
    memory_mb: float | None,
) -> RemoteJob:  # fmt: skip
    """Play a run on a node with room for it; see :func:`sim.study.job.start`."""
    task = ray.remote(_play).options(
        num_cpus=cpus, num_gpus=gpus, memory=None if memory_mb is None else int(memory_mb * 2**20), max_retries=0
    )
    return RemoteJob(task.remote(list(overrides), folder, dict(variables), minutes, memory_mb))


def _play(
    overrides: Sequence[str], folder: Path, variables: Mapping[str, str], minutes: float | None, memory_mb: float | None
) -> tuple[int, str | None]:
    """On the node. Ray has chosen the GPUs, and they are in the environment that the run inherits."""
    job = start(overrides, folder, variables)
    while (code := job.poll()) is None:
        time.sleep(POLL)
        job.hold_to(minutes, memory_mb)
    job.close()
    return code, job.cause
