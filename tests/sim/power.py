"""The power goes while a run saves its state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sim.checkpoint import States


class Stopped(BaseException):
    """The power went."""


@contextmanager
def stopping(savings: int) -> Iterator[None]:
    """Let the power go after a number of savings."""
    counted, write = [0], States._write

    def counting(*arguments) -> None:
        write(*arguments)
        counted[0] += 1
        if counted[0] == savings:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(States, "_write", counting)
        yield
