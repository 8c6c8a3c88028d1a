"""Processes that were started here, and all that descend from them: found, waited for and ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

GRACE_SECONDS = 3.0


class Process(Protocol):
    """What of a process matters here, however it was started; :class:`subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Look, and return the exit status or nothing."""

    def terminate(self) -> None:
        """Ask it to stop."""


class Family:
    """Processes of ours and all that descend from them, also where a parent is gone: who shares a session with one belongs to it."""

    def __init__(self) -> None:
        self.own: list[Process] = []
        self.sessions: set[int] = set()
        self.reader: threading.Thread | None = None  # ends when the last writer has

    def adopt(self, process: Process) -> None:
        """Take in a process that leads its own session."""
        self.own.append(process)
        self.sessions.add(process.pid)

    def members(self) -> set[int]:
        """The ids of all that are alive."""
        for process in self.own:
            process.poll()
        for session in self.sessions - {process.pid for process in self.own if process.poll() is None}:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-session, os.WNOHANG) != (0, 0):
                    pass  # take leave of the dead that were adopted
        table = dict(_processes())
        found: set[int] = set()
        while True:
            new = {pid for pid, (parent, session) in table.items() if pid not in found and (session in self.sessions or parent in found)}
            if not new:
                return found
            found |= new
            self.sessions |= {table[pid][1] for pid in new} - {os.getsid(0)}

    def kill(self) -> None:
        """End them all: ask those that were started here, which take their children along; then insist.

        Nothing is lost by it, since what they would save on the way lies in a temporary folder.
        """
        for process in self.own:
            process.terminate()
        start = time.monotonic()
        while (members := self.members()) and (waited := time.monotonic() - start) < 10:
            for pid in members if waited > GRACE_SECONDS else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.members()  # the last goodbye
        if self.reader is not None:
            self.reader.join(5)


def _processes() -> Iterator[tuple[int, tuple[int, int]]]:
    """(pid, (parent, session)) of every process of the machine, without the dead that others have to take leave of.

    A dead child of this process counts until it was waited for: its other threads may still be at work.
    """
    listing = []
    if Path("/proc/self/stat").exists():
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, parent, *_ = entry.read_text(errors="replace").rpartition(")")[2].split()
                listing.append((entry.parent.name, parent, state))
    else:
        text = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
        listing = [(pid, parent, state) for pid, parent, state, *_ in (line.split() for line in text.splitlines())]
    for pid, parent, state in listing:
        with contextlib.suppress(OSError):
            if not state.startswith(("Z", "X")) or int(parent) == os.getpid():
                yield int(pid), (int(parent), os.getsid(int(pid)))


@contextlib.contextmanager
def orphans_adopted() -> Iterator[None]:
    """On Linux, what loses its parent inside the block becomes a child of this process, so that it can be found and waited for."""
    if sys.platform != "linux":
        yield
        return
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    prctl(set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(set_child_subreaper, 0, 0, 0, 0)
