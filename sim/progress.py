"""What a person sees while a run goes on, and its table at the end."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sim.results import Row

DRAW = 0.1  # seconds between two updates of a bar
SAY = 5.0  # seconds between two lines about a stage, where there is no terminal


@dataclass
class _Stage:
    begun: float
    first: int
    shown: int
    due: float
    ended: bool = False
    task: TaskID | None = None


class Progress:
    """Call it after every step of a long loop: ``progress("mining DI", 20, 1000, loss=0.3)``.

    On a terminal each stage has a bar with the time left; elsewhere there is a line now and then. A call that has nothing to show returns
    at once and does not look at ``info``, so a loss may stay on its device.

    Args:
        console: where to; stderr by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._stages: dict[str, _Stage] = {}
        self._bars: Bars | None = None
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[info]}", markup=False),
                console=self.console,
                refresh_per_second=1 / DRAW,
            )

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, **info: object) -> None:
        """``done`` of ``total`` steps of ``stage`` are finished; a stage that begins anew starts its bar again."""
        now = time.monotonic()
        state = self._stages.get(stage)
        if state is not None and done < total and now < state.due:
            return
        if state is None:
            state = self._stages[stage] = _Stage(now, done, done, now if self._bars else now + SAY)
        elif done < state.shown:
            state.begun, state.first = now, done
        state.shown = done
        if self._bars:
            self._draw(self._bars, stage, state, done, total, info)
            state.due = now + DRAW
        elif now >= state.due or (done >= total and not state.ended):
            self.console.print(Text(_line(stage, state, now, done, total, info)), soft_wrap=True)
            state.due = now + SAY
        state.ended = state.ended or done >= total

    def _draw(self, bars: Bars, stage: str, state: _Stage, done: int, total: int, info: Mapping[str, object]) -> None:
        if state.task is None:
            state.task = bars.add_task(stage, total=total, info="")
        elif done == state.first:
            bars.reset(state.task)
        bars.update(state.task, completed=done, total=total, info=_words(info))


def table(rows: Sequence[Row]) -> str:
    """The final table in plain characters; it is Markdown, so it can be pasted into a note as it is."""
    made = Table(box=box.MARKDOWN)
    made.add_column("method", overflow="fold")
    for name in ("accuracy (%)", "ratio to the ensemble", "seconds"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        made.add_row(Text(row.method), f"{100 * row.accuracy:.2f}", ratio, f"{row.seconds:.1f}")
    out = io.StringIO()
    Console(file=out, width=100).print(made)
    return out.getvalue().strip()


def _line(stage: str, state: _Stage, now: float, done: int, total: int, info: Mapping[str, object]) -> str:
    parts = [f"{stage}: {done}/{total}"]
    if info:
        parts.append(_words(info))
    if done >= total:
        parts.append(f"took {duration(now - state.begun)}")
    elif done > state.first:
        parts.append(f"{duration((now - state.begun) * (total - done) / (done - state.first))} left")
    return ", ".join(parts)


def _words(info: Mapping[str, object]) -> str:
    words = {name: f"{float(value):.4g}" if isinstance(value, float | Tensor) else str(value) for name, value in info.items()}
    return ", ".join(f"{name} {word}" for name, word in words.items())


def duration(seconds: float) -> str:
    """Seconds in words, e.g. ``1 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
