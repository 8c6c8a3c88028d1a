"""What a study's folder says in its tables: the question, a result for each run and method, and what was damaged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

FINISHED = "finished"


@dataclass
class Damage:
    """Counts what is damaged, so that a thousand broken lines become one sentence."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, file: str, what: str) -> None:
        """Remember that something in ``file`` is left out, and why."""
        self.found.setdefault(file, []).append(what)

    def lines(self) -> list[str]:
        """One line a file."""
        return [
            f"{file}: {all_of[0]}" + (f"; and {len(all_of) - 1:,} more like it" if len(all_of) > 1 else "")
            for file, all_of in self.found.items()
        ]


@dataclass(frozen=True)
class Study:
    """What was asked: ``study.json``.

    Attributes:
        name: of the study.
        question: one sentence.
        base: the settings that all runs share, as overrides.
        axes: the values of each key that differs, as they stand in ``results.csv``.
        seeds: of every setting.
        compare: the methods to show, in this order; none means all.
        baseline: the method that the others are compared with, or nothing.
        command: that runs the study.
    """

    name: str
    question: str
    base: tuple[str, ...]
    axes: Mapping[str, tuple[str, ...]]
    seeds: tuple[str, ...]
    compare: tuple[str, ...]
    baseline: str | None
    command: str

    @property
    def points(self) -> int:
        """How many runs it has."""
        return math.prod(len(values) for values in self.axes.values()) * len(self.seeds)


@dataclass(frozen=True)
class Result:
    """One line of ``results.csv``.

    Attributes:
        point: the name of the run's folder below ``points/``.
        setting: the values of the axes, without the seed.
        seed: of the run.
        status: finished, failed, interrupted, running or waiting.
        cause: why it is not finished, or nothing.
        method: or nothing, where a run has no result.
        accuracy: in [0, 1], or unknown.
        values: the line as it stands, by column, from the seed on; an axis may be called as one of these columns is.
    """

    point: str
    setting: tuple[str, ...]
    seed: str
    status: str
    cause: str
    method: str
    accuracy: float | None
    values: Mapping[str, str]

    def number(self, column: str) -> float | None:
        """A column's number, where it has a finite one."""
        return finite(self.values.get(column))


@dataclass(frozen=True)
class Content:
    """All that a study's folder says in tables.

    Attributes:
        folder: of the study.
        study: what was asked.
        axes: the columns of the settings.
        results: the lines, in their order.
        costs: numbers by point and method.
        notices: one line for each file that is missing or damaged.
    """

    folder: Path
    study: Study
    axes: tuple[str, ...]
    results: tuple[Result, ...]
    costs: Mapping[tuple[str, str], Mapping[str, float]]
    notices: tuple[str, ...]

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The methods that have results and are to be shown, in the order in which they are shown."""
        present = dict.fromkeys(result.method for result in self.results if result.method and result.accuracy is not None)
        return tuple(method for method in self.study.compare or present if method in present)

    @cached_property
    def settings(self) -> tuple[tuple[str, ...], ...]:
        """Every setting once, in the order of the lines."""
        return tuple(dict.fromkeys(result.setting for result in self.results))

    @cached_property
    def finished(self) -> tuple[Result, ...]:
        """The results that count: those of finished runs. What a run says on its way is not its last word."""
        return tuple(result for result in self.results if result.status == FINISHED and result.method and result.accuracy is not None)

    @cached_property
    def varying(self) -> tuple[int, ...]:
        """The places of the axes that take several values."""
        return tuple(place for place in range(len(self.axes)) if len({setting[place] for setting in self.settings}) > 1)

    @cached_property
    def runs(self) -> Mapping[str, Sequence[Result]]:
        """The lines of every point."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.point, []).append(result)
        return found

    def label(self, setting: Sequence[str], places: Iterable[int] | None = None) -> str:
        """A setting in words: the axes at ``places``, by default those that vary, with their values."""
        chosen = self.varying if places is None else tuple(places)
        return ", ".join(f"{self.axes[place]} {setting[place] or '–'}" for place in chosen)


def finite(text: object) -> float | None:
    """A text's number, where it is a finite one."""
    try:
        value = float(text) if isinstance(text, str | int | float) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
