"""The picture of a run on a terminal: a line for the run, one for all stages that are through, and a bar for each that is at work."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sim.stages import Stage, Work, duration, speed

GAP = 2  # between columns
BARS = (40, 30, 20, 10)  # lengths of a bar: few, so that it does not change with every digit beside it
NAME, COUNT, SPEED, LEFT, WORDS = range(5)
DEAREST = (NAME, LEFT, COUNT, SPEED, WORDS)  # what a narrow terminal does without stands last


class View:
    """Draws a run's progress whenever it is called.

    Args:
        console: whose width counts.
        work: what to draw; it may change at any time.
    """

    def __init__(self, console: Console, work: Work) -> None:
        self.console, self.work = console, work

    def __call__(self) -> RenderableType:
        width, lines = self.console.width, list[RenderableType]()
        round, elapsed, left = self.work.told(time.monotonic())
        active, over = self.work.active(), self.work.over()
        if round:
            lines.append(_one_line(", ".join(_fitting([round, self.work.current if active else "", elapsed, left], (0, 3, 2, 1), width))))
        if over:
            lines.append(_one_line("done: " + ", ".join(f"{stage.name} {duration(stage.before + stage.spent)}" for stage in over), "dim"))
        if active:
            lines.append(_bars(active, width))
        return Group(*lines)


def _one_line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _fitting(parts: Sequence[str], order: Sequence[int], width: int) -> list[str]:
    """The parts that have room in a line, chosen in an order of their own."""
    chosen: list[int] = []
    for part in order:
        if parts[part] and sum(len(parts[one]) + 2 for one in (*chosen, part)) - 2 <= width:
            chosen.append(part)
    return [parts[part] for part in sorted(chosen)]


def _bars(stages: Sequence[Stage], width: int) -> Table:
    """Each stage with a bar, in columns; what has no room is left out for all of them."""
    cells = [
        (stage.name, f"{stage.done}/{stage.total}", speed(stage), "" if stage.left is None else f"{duration(stage.left)} left", stage.words)
        for stage in stages
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(DEAREST))]
    shown, room = [NAME], width - min(widths[NAME], width)
    for column in DEAREST[1:]:
        if 0 < widths[column] + GAP <= room and widths[column]:
            shown.append(column)
            room -= widths[column] + GAP
    bar = next((length for length in BARS if length + GAP <= room), 0)
    table = Table.grid(padding=(0, GAP, 0, 0))
    for column in sorted(shown):
        table.add_column(no_wrap=True, overflow="ellipsis", justify="right" if column in (COUNT, SPEED, LEFT) else "left")
        if column == NAME and bar:
            table.add_column(width=bar)
    for stage, row in zip(stages, cells, strict=True):
        line: list[RenderableType] = [Text(row[column]) for column in sorted(shown)]
        if bar:
            line.insert(1, ProgressBar(total=max(stage.total, 1), completed=stage.done, width=bar))
        table.add_row(*line)
    return table
