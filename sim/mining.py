"""Mining a long synthesis with several processes; what they finish is on disk, see :mod:`sim.parts`.

Workers take whole streams, so the images do not depend on how many workers there are. A worker that loses its parent ends by itself; one
that is lost ends the job. Workers are killed, not asked: the folder bears it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedimpr.devices import placed
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Impressions
from fedimpr.observation import compiled
from fedimpr.synthesis import Progress, Synthesizer
from fedimpr.synthesis.streams import Job, merged, mine_stream
from sim.config import construct
from sim.federation import threads
from sim.parts import PartsFolder
from sim.weights import read_model

SAY = 0.2  # seconds between two messages of a worker

Tell = Callable[[int, int, float, float | None], None]
"""Takes a stream, the part it is at, the share of the part that is done, and the loss where one is known."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that decides the images of a long synthesis.

    Attributes:
        job: how many images, in what parts.
        method: its name.
        synthesizer: the node of the settings that describes it.
        teacher: a file, see :func:`sim.weights.read_model`.
        student: the same, or ``None``.
        shape: (C, H, W) of the images.
        device: where to compute. On a machine with n GPUs worker w takes GPU ``w % n``.
        threads: of a worker on the CPU.
        compile: whether passes are compiled, see :func:`fedimpr.observation.compiled`.
    """

    job: Job
    method: str
    synthesizer: Mapping[str, Any]
    teacher: Path
    student: Path | None
    shape: tuple[int, int, int]
    device: Literal["cpu", "cuda"]
    threads: int
    compile: bool

    def facts(self) -> dict[str, object]:
        """The same as JSON knows it, with the models' files by their SHA-256."""
        student = None if self.student is None else _hash(self.student)
        return {**asdict(self), "shape": list(self.shape), "teacher": _hash(self.teacher), "student": student}

    def build(self) -> Synthesizer:
        """A fresh synthesizer."""
        synthesizer: Synthesizer = construct(self.synthesizer, f"synthesis.{self.method}.synthesizer")
        return synthesizer

    def models(self, device: torch.device) -> tuple[nn.Module, nn.Module | None]:
        """Teacher and student.

        Raises:
            FedimprError: one of them cannot be used.
        """
        teacher, classes = read_model(self.teacher, "teacher", self.shape)
        if self.student is None:
            return placed(teacher, device), None
        student, known = read_model(self.student, "student", self.shape)
        if known != classes:
            raise ConfigError("student", str(self.student), f"a model with the teacher's {classes} classes; this one has {known}")
        return placed(teacher, device), placed(student, device)

    def device_of(self, worker: int) -> torch.device:
        """Where a worker computes."""
        return torch.device("cuda", worker % torch.cuda.device_count()) if self.device == "cuda" else torch.device("cpu")


def mine(task: Task, folder: Path, *, workers: int, progress: Progress) -> tuple[Impressions, float]:
    """Mine what is not yet in ``folder``; return all impressions in the order of their parts, and the seconds that all parts took.

    Args:
        task: what to mine.
        folder: takes the parts; one that holds some of this very task's is continued.
        workers: processes; 1 is this one.
        progress: told how many images are done.

    Raises:
        ConfigError: a setting is wrong, or the folder belongs to another task.
        FedimprError: a part could not be mined; the message names stream and part, and finished parts are kept.
    """
    job, files = task.job, PartsFolder(folder)
    if workers < 1:
        raise ConfigError("workers", workers, "an integer >= 1")
    if workers > job.streams:
        raise ConfigError("workers", workers, f"at most streams={job.streams}, since one worker mines a whole stream; or more streams")
    with compiled(task.compile):
        task.build(), task.models(torch.device("cpu"))  # what is wrong is found before anything is written
    with files.held(task.facts()):
        missing = {stream: parts for stream in range(job.streams) if (parts := files.missing(job, stream))}
        meter, streams = _Meter(task, [part for parts in missing.values() for part in parts], progress), list(missing)
        if workers == 1:
            with threads(task.threads):
                _work(task, files, streams, task.device_of(0), meter)
        else:
            _share_out(task, files, [share for w in range(workers) if (share := streams[w::workers])], meter)
        found = {part: files.read(part) for part in range(job.parts)}
    return merged({part: made for part, (made, _) in found.items()}), sum(seconds for _, seconds in found.values())


class _Meter:
    """Adds up what the workers tell."""

    def __init__(self, task: Task, missing: Sequence[int], progress: Progress) -> None:
        self.task, self.progress = task, progress
        self.shares = dict.fromkeys(range(task.job.parts), 1.0) | dict.fromkeys(missing, 0.0)

    def __call__(self, stream: int, part: int, share: float, loss: float | None) -> None:
        self.shares[part] = share
        images = sum(self.task.job.size(part) * share for part, share in self.shares.items())
        info = {} if loss is None else {"loss": loss}
        self.progress(f"mining {self.task.method}", int(images), self.task.job.count, **info)


def _work(task: Task, files: PartsFolder, streams: Sequence[int], device: torch.device, tell: Tell) -> None:
    """Mine what is missing of some streams."""
    if not streams:
        return
    teacher, student = task.models(device)
    with compiled(task.compile):
        for stream in streams:
            _work_on(task, files, stream, teacher, student, tell)


def _work_on(task: Task, files: PartsFolder, stream: int, teacher: nn.Module, student: nn.Module | None, tell: Tell) -> None:
    """Mine what is missing of a stream."""
    missing = files.missing(task.job, stream)
    part, state = files.before(stream, missing[0])
    try:
        synthesizer = task.build()
        synthesizer.load_state_dict(state)
        tell(stream, part, 0.0, None)
        begun, told = time.monotonic(), _rarely(stream, tell)
        parts = mine_stream(synthesizer, teacher, task.job, stream, shape=task.shape, student=student, done=part, progress=told)
        for done, made in parts:
            files.write(done, made, time.monotonic() - begun, synthesizer.state_dict(), task.job)
            tell(stream, done, 1.0, None)
            if done == missing[-1]:
                break
            part, begun = done + task.job.streams, time.monotonic()
            tell(stream, part, 0.0, None)
    except Exception as error:
        problem = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise FedimprError(problem, stage=_place(task, stream, part), remedy="Finished parts are kept.") from error


def _rarely(stream: int, tell: Tell) -> Progress:
    """Passes on a few steps a second, so that neither the device nor who listens is asked too often."""
    due = 0.0

    def told(stage: str, done: int, total: int, **info: object) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            due, loss = now + SAY, info.get("loss")
            tell(stream, int(str(info["part"])), done / total, float(loss) if isinstance(loss, float | Tensor) else None)

    return told


def _place(task: Task, stream: int, part: int) -> str:
    return f"mining {task.method}, stream {stream}, part {part}"


def _share_out(task: Task, files: PartsFolder, shares: Sequence[Sequence[int]], tell: Tell) -> None:
    """Mine each share of streams in a process of its own."""
    context, processes, places = get_context("spawn"), {}, {}
    try:
        for worker, streams in enumerate(shares):
            listener, speaker = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(task, files, streams, task.device_of(worker), speaker), daemon=True)
            with _interrupts_ignored():  # and by the process from its first moment: Ctrl-C reaches all, and this one decides
                process.start()
            speaker.close()
            processes[listener], places[listener] = process, (streams[0], streams[0])
        waiting = set(processes)
        while waiting:
            for listener in [one for one in wait(list(waiting)) if isinstance(one, Connection)]:
                try:
                    news = listener.recv()
                except EOFError:
                    waiting.remove(listener)
                    processes[listener].join()
                    if status := processes[listener].exitcode:
                        cause = f"signal {-status}" if status < 0 else f"status {status}"
                        raise FedimprError(
                            f"the worker died ({cause})", stage=_place(task, *places[listener]), remedy="Finished parts are kept."
                        ) from None
                    continue
                if isinstance(news, str):
                    raise FedimprError(news)
                places[listener] = news[:2]
                tell(*news)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _serve(task: Task, files: PartsFolder, streams: Sequence[int], device: torch.device, speaker: Connection) -> None:
    """The life of a worker. It says how far it is, or in one text what went wrong."""

    def say(news: object) -> None:
        try:
            speaker.send(news)
        except OSError:
            os._exit(1)  # nobody is left to hear it

    torch.set_num_threads(task.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        _work(task, files, streams, device, lambda *news: say(news))
    except FedimprError as error:
        say(str(error))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C does nothing inside the block, nor ever in processes that start there; nothing to do outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
