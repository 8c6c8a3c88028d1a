"""The curves in a run's metrics: as a table for other programs, and where the curves of two runs part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sim.results import csv_of, read_metrics, replace_file

# What says where a value belongs and is none itself.
PLACE = ("time", "stage", "client", "method", "round", "step", "total")

# Measured by a clock: no two runs have the same.
MEASURED = ("seconds", "mining_seconds")

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # as a line's note says what its null was


class Point(NamedTuple):
    """One number of the metrics.

    Attributes:
        time: seconds since the start of the run, or of its last resumption.
        stage: e.g. ``"client"``, ``"candidate"``, ``"distilling di"``.
        series: which of several curves of the stage: ``"client 3"``, ``"FedAvg"``; empty where there is one.
        round: counted from 1; ``None`` where the line names none.
        step: of the stage's own loop; ``None`` outside of one.
        name: e.g. ``"loss"``.
        value: may be NaN or infinite.
    """

    time: float | None
    stage: str
    series: str
    round: int | None
    step: int | None
    name: str
    value: float


Curve = tuple[str, str, str]
"""Stage, series and name of a value."""

Place = tuple[int, int]
"""Round and step; 0 where there is none. So a curve of rounds runs along the first, one of steps along both."""


class Parting(NamedTuple):
    """Where two curves part.

    Attributes:
        curve: which.
        place: the first where both have a value and these differ, else the first where only one of them has one.
        one: the value there; ``None`` where there is none.
        two: the other's.
    """

    curve: Curve
    place: Place
    one: float | None
    two: float | None


def points(line: Mapping[str, Any]) -> list[Point]:
    """All numbers of one line of ``metrics.jsonl``; what was not finite is so again."""
    lost = dict(part.split(" is ", 1) for part in str(line.get("note", "")).split("; ") if " is " in part)
    series = f"client {line['client']}" if "client" in line else str(line.get("method", ""))
    found = []
    for name, value in line.items():
        if value is None:
            value = NOT_FINITE.get(lost.get(name, ""))
        if name not in PLACE and isinstance(value, int | float) and not isinstance(value, bool):
            found.append(
                Point(line.get("time"), str(line.get("stage", "")), series, _whole(line, "round"), _whole(line, "step"), name, value)
            )
    return found


def write_curves(folder: Path) -> Path:
    """Write ``curves.csv`` from the metrics in a result folder: a line a number, in the order in which they were told.

    Raises:
        FedimprError: the metrics are damaged, or the file cannot be written.
    """
    path = folder / "curves.csv"
    replace_file(path, csv_of(Point._fields, (point for line in read_metrics(folder / "metrics.jsonl") for point in points(line))))
    return path


def curves(metrics: Iterable[Mapping[str, Any]]) -> dict[Curve, dict[Place, float]]:
    """The curves of a run, without what a clock measured.

    The order of lines plays no part. What was told twice, of a stage that was resumed, counts as it was told last.
    """
    found: dict[Curve, dict[Place, float]] = {}
    for line in metrics:
        for point in points(line):
            if point.name not in MEASURED:
                found.setdefault((point.stage, point.series, point.name), {})[point.round or 0, point.step or 0] = point.value
    return found


def partings(one: Mapping[Curve, Mapping[Place, float]], two: Mapping[Curve, Mapping[Place, float]]) -> list[Parting]:
    """Where each curve that differs does so first; those that part early come first."""
    found = []
    for curve in dict.fromkeys([*one, *two]):
        a, b = one.get(curve, {}), two.get(curve, {})
        differing = [place for place in a.keys() & b.keys() if not _same(a[place], b[place])]
        if lonely := differing or a.keys() ^ b.keys():
            place = min(lonely)
            found.append(Parting(curve, place, a.get(place), b.get(place)))
    return sorted(found, key=lambda parting: parting.place)


def words(place: Place) -> str:
    """A place as a reader says it."""
    round, step = place
    return ", ".join(text for text, given in ((f"round {round}", round), (f"step {step}", step)) if given) or "once"


def _whole(line: Mapping[str, Any], key: str) -> int | None:
    value = line.get(key)
    return value if isinstance(value, int) else None


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
