"""What a person sees while a run goes on."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import SupportsFloat

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sim.signals import heed
from sim.stages import Rounds, Stage, Work, duration, speed
from sim.view import View

DRAW = 0.25  # seconds between two pictures on a terminal
SAY = 5.0  # seconds between two lines, where there is none
UNITS = {"training clients": "clients"}  # of stages that count something else than the others


class Progress:
    """Call it after every step of a long loop: ``progress("mining di", 20, 1000, loss=0.3)``.

    On a terminal there is a picture, see :mod:`sim.view`; elsewhere there is a line now and then. A call that has nothing to show returns
    at once and does not look at ``info``, so a loss may stay on its device.

    Args:
        console: where to; stderr by default.
        unit: what stages count, but for :data:`UNITS`.
    """

    def __init__(self, console: Console | None = None, unit: str = "steps") -> None:
        self.console, self.unit, self.work = console or Console(stderr=True), unit, Work()
        self._handlers: list[logging.StreamHandler] = []
        self._live: Live | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(get_renderable=View(self.console, self.work), console=self.console, refresh_per_second=1 / DRAW)
        self._pause = DRAW if self._live else SAY
        self._last = time.monotonic()
        self._due = self._last + self._pause

    def __enter__(self) -> Progress:
        if self._live:
            before = sys.stderr
            self._live.start()
            # Warnings go above the picture, but their handlers still hold the stream that it has replaced.
            handlers = [one for one in logging.getLogger().handlers if isinstance(one, logging.StreamHandler)]
            self._handlers = [one for one in handlers if one.stream is before]
            for handler in self._handlers:
                handler.setStream(sys.stderr)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.work.ended = True
        if self._live:
            self._live.stop()
            for handler in self._handlers:
                handler.setStream(sys.stderr)

    def round(self, round: int, rounds: int) -> None:
        """A round of so many begins; what the one before has left open is over."""
        now = self._last = time.monotonic()
        for stage in self.work.stages.values():
            stage.ended = True
        if self.work.rounds is None:
            self.work.rounds = Rounds(now, now, round, rounds)
        else:
            known = self.work.rounds
            self.work.rounds = Rounds(known.begun, now, round, rounds, known.over + 1)

    def __call__(self, stage: str, done: int, total: int, **info: object) -> None:
        """``done`` of ``total`` steps of ``stage`` are finished; a stage that begins anew is counted anew. Raises for a lost signal."""
        heed()
        now = time.monotonic()
        passed, self._last = now - self._last, now
        state = self.work.stages.get(stage)
        if state is None:
            state = self.work.stages[stage] = Stage(stage, UNITS.get(stage, self.unit), done, done, total)
        elif state.ended or done < state.done:
            state.before, state.spent, state.first, state.ended = state.before + state.spent, 0.0, done, False
        else:
            state.spent, state.done = state.spent + passed, done
            if done < total and now < self._due:
                return
        state.done, state.total, state.ended, self.work.current = done, total, done >= total, stage
        if now >= self._due or state.ended:
            state.words = _words(info)
        if now >= self._due or (state.ended and not state.said):
            state.said, self._due = state.said or state.ended, now + self._pause
            if not self._live:
                self.console.print(Text(self._line(state, now)), soft_wrap=True)

    def where(self) -> str:
        """How far the work has come, in a line: ``"round 2 of 5; the last that was heard of: mining di, 20 of 1000 steps"``."""
        round, _, _ = self.work.told(time.monotonic())
        last = self.work.stages.get(self.work.current)
        heard = f"the last that was heard of: {last.name}, {last.done} of {last.total} {last.unit}" if last else ""
        return "; ".join(filter(None, (round, heard)))

    def _line(self, state: Stage, now: float) -> str:
        round, elapsed, rest = self.work.told(now)
        left = f"{duration(state.left)} left" if state.left is not None else ""
        end = f"took {duration(state.spent)}" if state.ended else left
        stage = ", ".join(filter(None, (f"{state.name}: {state.done}/{state.total}", state.words, speed(state), end)))
        run = ", ".join(filter(None, (elapsed, rest)))
        return "; ".join(filter(None, (f"{round}, {stage}" if round else stage, run and f"the run: {run}")))


def _words(info: Mapping[str, object]) -> str:
    # A tensor is told by what it can do: a study's own process shows progress too, and has no need of PyTorch.
    number = {name: isinstance(value, SupportsFloat) and not isinstance(value, int) for name, value in info.items()}
    words = {name: f"{float(value):.4g}" if number[name] else str(value) for name, value in info.items()}  # type: ignore[arg-type]
    return ", ".join(f"{name} {word}" for name, word in words.items())
