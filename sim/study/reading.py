"""Reads a study's folder as far as it is there: what is damaged becomes one line, and the rest is read."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

NEEDED = ("point", "seed", "status", "method", "accuracy")  # columns of results.csv without which nothing can be told
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


def read_study(folder: Path) -> Content:
    """What the folder's ``study.json``, ``results.csv`` and ``costs.csv`` say; whatever is missing or damaged becomes a notice."""
    damage = Damage()
    study = _study(folder, damage)
    head, lines = _table(folder / "results.csv", NEEDED, damage)
    axes = tuple(head[1 : head.index("seed")]) if head else tuple(study.axes)
    costs_head, costs = _table(folder / "costs.csv", ("point", "method"), damage, optional=True)
    numbers = [name for name in costs_head if name not in ("point", "method")]
    return Content(
        folder=folder,
        study=study,
        axes=axes,
        results=_results(head, lines, damage),
        costs={
            (line["point"], line["method"]): {name: value for name in numbers if (value := finite(line[name])) is not None}
            for line in (dict(zip(costs_head, row, strict=True)) for _, row in costs)
        },
        notices=tuple(damage.lines()),
    )


def _study(folder: Path, damage: Damage) -> Study:
    tree: Any = None
    try:
        tree = json.loads((folder / "study.json").read_bytes())
    except FileNotFoundError:
        damage.add("study.json", "it is missing, so neither the question nor the number of runs is known")
    except (OSError, ValueError, RecursionError) as error:
        damage.add("study.json", f"it cannot be read ({_said(error)}), so neither the question nor the number of runs is known")
    else:
        if not isinstance(tree, dict):
            damage.add("study.json", "it is no JSON object, so neither the question nor the number of runs is known")
    tree = tree if isinstance(tree, dict) else {}
    axes = tree.get("axes") if isinstance(tree.get("axes"), dict) else {}
    baseline = tree.get("baseline")
    return Study(
        name=str(tree.get("name") or folder.resolve().name),
        question=str(tree.get("question") or ""),
        base=_texts(tree.get("base")),
        axes={str(key): _texts(values) for key, values in axes.items()},
        seeds=_texts(tree.get("seeds")),
        compare=_texts(tree.get("compare")),
        baseline=None if baseline is None else str(baseline),
        command=str(tree.get("command") or ""),
    )


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values) if isinstance(values, list) else ()


def _table(path: Path, needed: Sequence[str], damage: Damage, *, optional: bool = False) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The head of a CSV file, and its whole lines with their numbers in the file; neither where a needed column is missing."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        if not optional:
            damage.add(path.name, "it is missing, so there is nothing to show yet")
        return [], []
    except OSError as error:
        damage.add(path.name, f"it cannot be read ({_said(error)})")
        return [], []
    whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(whole, newline=""))
    head: list[str] | None = None
    lines: list[tuple[int, list[str]]] = []
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            damage.add(path.name, f"line {first} is damaged ({error}) and left out")
            continue
        if head is None:
            head = row
        elif len(row) == len(head):
            lines.append((first, row))
        elif row:
            damage.add(path.name, f"line {first} has {len(row)} fields where the head has {len(head)}, and is left out")
    if whole != text:
        damage.add(path.name, f"line {whole.count(chr(10)) + 1} is cut off and left out")
    lost = [name for name in needed if name not in (head or ())]
    if lost or (head and head[0] != "point"):
        damage.add(
            path.name, f"its head has no column {', '.join(lost)}" if lost else f"its first column is {head[0]!r} where point belongs"
        )
        return [], []
    return head or [], lines


def _results(head: Sequence[str], lines: Sequence[tuple[int, Sequence[str]]], damage: Damage) -> tuple[Result, ...]:
    """The lines that make sense; a method that a point has twice counts once."""
    found: dict[tuple[str, str], Result] = {}
    for number, row in lines:
        first = head.index("seed")
        line, point, setting = dict(zip(head[first:], row[first:], strict=True)), row[0], tuple(row[1:first])
        accuracy, method = finite(line["accuracy"]), line["method"]
        if Path(point).name != point or point in ("", "..") or "\0" in point:
            damage.add("results.csv", f"line {number} names no point ({point!r}), and is left out")
        elif line["accuracy"] and (accuracy is None or not 0 <= accuracy <= 1):
            damage.add(
                "results.csv", f"line {number} has an accuracy of {line['accuracy']!r} where a number in [0, 1] belongs, and is left out"
            )
        elif (point, method) in found:
            damage.add("results.csv", f"line {number} says again what {point} has of {method or 'no method'}, and is left out")
        else:
            found[point, method] = Result(point, setting, line["seed"], line["status"], line.get("cause", ""), method, accuracy, line)
    return tuple(found.values())


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
