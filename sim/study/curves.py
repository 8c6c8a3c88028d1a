"""Accuracy as runs go on, from their metrics: by round, by traffic, by simulated time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from sim.charts import COLOURS, ticks
from sim.study.content import Content, Damage, finite
from sim.study.series import PANELS, Panel, Plot, Point, axis_plots, ceiling_plot, heights
from sim.study.statistics import Entry

WANTED = re.compile(rb'"stage":\s*"(candidate|round)"')  # a run has hundreds of other lines, which need not be parsed
UNITS = {
    "traffic": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")),
    "simulated time": ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")),
}


@dataclass
class Moment:
    """The end of a round: the accuracies in [0, 1] by method, and what was spent since the start of the run, where that is known."""

    accuracies: dict[str, float] = field(default_factory=dict)
    traffic: float | None = None
    seconds: float | None = None


def history(path: Path, damage: Damage) -> dict[int, Moment]:
    """What a ``metrics.jsonl`` says of its rounds; a damaged line is told to ``damage`` and left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        damage.add("metrics.jsonl", f"that of point {path.parent.name} is missing, so its curves are")
        return {}
    rounds: dict[int, Moment] = {}
    spent: dict[int, float] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text) if WANTED.search(text) or not (text[:1] == b"{" and text[-1:] == b"}") else {}
        except ValueError:
            line = None
        if not isinstance(line, dict):
            state = "is cut off" if number == len(lines) else "is damaged"
            damage.add("metrics.jsonl", f"line {number} of point {path.parent.name} {state} and left out")
            continue
        if not isinstance(line.get("round"), int):
            continue
        moment = rounds.setdefault(line["round"], Moment())
        if line.get("stage") == "candidate" and (accuracy := finite(line.get("test_accuracy"))) is not None:
            moment.accuracies[str(line.get("method"))] = accuracy
        elif line.get("stage") == "round":
            down, up = finite(line.get("bytes_down")), finite(line.get("bytes_up"))
            if down is not None and up is not None:
                spent[line["round"]] = down + up
            moment.seconds = finite(line.get("simulated_seconds"))
    for number, moment in rounds.items():
        if all(earlier in spent for earlier in range(1, number + 1)):
            moment.traffic = sum(spent[earlier] for earlier in range(1, number + 1))
    return rounds


class Seen(NamedTuple):
    """A method at the end of a round of one run."""

    accuracy: float
    traffic: float | None
    seconds: float | None


Gathered = dict[str, dict[str, dict[int, list[Seen]]]]  # by panel, line and round: the seeds


def all_plots(content: Content, table: Sequence[Entry], damage: Damage) -> list[Plot]:
    """Every figure that the folder has data for."""
    return [*axis_plots(content, table), *curve_plots(content, damage), *ceiling_plot(content)]


def curve_plots(content: Content, damage: Damage) -> list[Plot]:
    """Accuracy by round, where runs have several, and by traffic and simulated time, where their metrics say something of them.

    Axes without numbers, a strategy say, become lines of one panel as long as there are colours for them; others make the panels.
    """
    joined = tuple(place for place in content.varying if any(finite(setting[place]) is None for setting in content.settings))
    combined = list(dict.fromkeys(tuple(setting[place] for place in joined) for setting in content.settings))
    if len(content.methods) * len(combined) > COLOURS:
        joined, combined = (), [()]
    apart = tuple(place for place in content.varying if place not in joined)
    panels = dict.fromkeys(content.label(result.setting, apart) for result in content.finished)
    gathered: Gathered = {title: {} for title in list(panels)[:PANELS]}
    for point, result in {result.point: result for result in content.finished}.items():
        lines = gathered.get(content.label(result.setting, apart))
        if lines is None:
            continue
        for number, moment in history(content.folder / "points" / point / "metrics.jsonl", damage).items():
            for method, accuracy in moment.accuracies.items():
                name = ", ".join((method, *(result.setting[place] for place in joined)))
                lines.setdefault(name, {}).setdefault(number, []).append(Seen(accuracy, moment.traffic, moment.seconds))
    names = tuple(", ".join((method, *more)) for method in content.methods for more in combined)
    axes: tuple[tuple[str, Callable[[int, Seen], float | None]], ...] = (
        ("round", lambda number, _: float(number)),
        ("traffic", lambda _, seen: seen.traffic),
        ("simulated time", lambda _, seen: seen.seconds),
    )
    plots = [_plot(what, gathered, names, len(panels) - len(gathered), across) for what, across in axes]
    return [plot for plot in plots if plot is not None]


def _plot(what: str, gathered: Gathered, names: tuple[str, ...], hidden: int, across: Callable[[int, Seen], float | None]) -> Plot | None:
    """A point a round: the mean of both axes over the seeds that know the horizontal one. ``None`` where all stand at one place."""
    found = {
        title: {name: points for name in names if (points := _points(lines.get(name, {}), across))} for title, lines in gathered.items()
    }
    places = [{point.x for points in lines.values() for point in points} for lines in found.values()]
    if all(len(xs) < 2 for xs in places):
        return None
    most = max(x for xs in places for x in xs)
    size, unit = next(((size, unit) for size, unit in UNITS.get(what, ()) if most >= size), (1.0, ""))
    panels = tuple(
        Panel(title, {name: [point._replace(x=point.x / size) for point in points] for name, points in lines.items()})
        for title, lines in found.items()
        if lines
    )
    return Plot(
        name=f"accuracy-by-{what.replace(' ', '-')}",
        title=f"Accuracy by {what}",
        across=f"{what} ({unit})" if unit else what,
        kind="curves",
        names=names,
        panels=panels,
        hidden=hidden,
        log=False,
        marks=tuple((mark, f"{mark:g}") for mark in ticks(0.0, most / size) if what != "round" or mark == int(mark)),
        heights=heights(panels),
    )


def _points(rounds: dict[int, list[Seen]], across: Callable[[int, Seen], float | None]) -> list[Point]:
    points = []
    for number, seeds in sorted(rounds.items()):
        known = [(x, 100 * seen.accuracy) for seen in seeds if (x := across(number, seen)) is not None]
        if known:
            ys = [y for _, y in known]
            points.append(Point(fmean(x for x, _ in known), fmean(ys), stdev(ys) if len(ys) > 1 else 0.0))
    return points
