"""One run of a study, in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from fedimpr.errors import FedimprError


def play(overrides: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
    """Run, or go on with, the federation of some overrides; the exit status is that of ``python -m sim``.

    The process leads a session of its own, so that all that it starts can be found and ended with it, and goes when the study's does.

    Args:
        overrides: with the result folder.
        log: a file that gets all that the run prints.
        variables: of the environment.
    """
    os.setsid()
    threading.Thread(target=_follow, daemon=True).start()
    with log.open("a", encoding="utf-8") as lines:
        os.dup2(lines.fileno(), 1)
        os.dup2(lines.fileno(), 2)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # where memory runs out it is a run that goes, not the study
    os.environ.update(variables)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sim.config import composed, in_one_line, placed
    from sim.runs import run
    from sim.signals import exit_status, listening

    with listening():
        try:
            run(placed(composed(overrides)), overrides)
        except BaseException as error:
            if exit_status():
                _end("stopped", 143)
            if isinstance(error, FedimprError):
                _end(f"error: {' '.join(str(error).split())}", 1)
            if isinstance(error, HydraException | OmegaConfBaseException):
                _end(f"error: {in_one_line(error, overrides, 'config')}", 1)
            traceback.print_exc()
            _end(f"error: {type(error).__name__}: {' '.join(str(error).split())}", 1)
    _end("", 0)


def _end(line: str, status: int) -> None:
    """Leave at once: threads that libraries have left behind must not keep a finished run from ending."""
    if line:
        print(line)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _follow() -> None:
    """End with the study, however that ends."""
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)
