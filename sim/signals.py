"""SIGINT and SIGTERM end a run wherever it is; and moments in which they must not, or would be lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came: list[int] = []  # what has been raised for


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt, nothing that handles errors must swallow it."""


@contextmanager
def listening() -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM raise wherever a run is, and are remembered. A SIGINT that is ignored stays ignored."""
    numbers = [signal.SIGTERM, signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else [signal.SIGTERM]
    before = {number: signal.signal(number, _stop) for number in numbers}
    try:
        yield
    finally:
        _came.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise _exception(number)


def heed() -> None:
    """Raise for a signal that came earlier and was lost: libraries swallow what is raised in their imports, or make it another error.

    Raises:
        KeyboardInterrupt: SIGINT came.
        Terminated: SIGTERM came.
    """
    if _came:
        raise _exception(_came[0])


def exit_status() -> int | None:
    """The exit status for the first signal that came: 130 for SIGINT, 143 for SIGTERM; ``None`` where none did."""
    return 128 + _came[0] if _came else None


def interrupted(error: BaseException) -> bool:
    """Whether it was a signal that ended a run with this error, and not the error."""
    return bool(_came) or not isinstance(error, Exception)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(f"signal {signal.Signals(number).name}")


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that ``finally`` gets its turn; nothing to do outside the main thread."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals that come inside the block are delivered after it."""
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signals_kept() -> Iterator[None]:
    """SIGINT and SIGTERM for whoever handled them before the block, once it is over: those that arrive while Ray starts may get lost in it,
    and Ray takes SIGTERM for itself. Who sends a second one does not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1 and callable(handler := before[signal.Signals(number)]):
            handler(number, frame)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as stop:
        if stop.code == signal.SIGTERM and callable(before[signal.SIGTERM]):  # it came to Ray's handler
            came.append(signal.SIGTERM)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
