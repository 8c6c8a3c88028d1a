"""What a study's figures show, before anybody draws it: lines of means over seeds, in panels that share their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sim.charts import ticks
from sim.study.content import Content, finite
from sim.study.statistics import Entry

PANELS = 12  # of one figure, at most
DECADE = 10.0  # an axis whose values span more than this factor is logarithmic


class Point(NamedTuple):
    """A mean over seeds.

    Attributes:
        x: in the unit of the horizontal axis.
        y: accuracy in %.
        spread: standard deviation in points; 0 where there is one seed only.
    """

    x: float
    y: float
    spread: float


@dataclass(frozen=True)
class Panel:
    """Lines that belong together; a line that has nothing here is not in it."""

    title: str
    lines: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: of its file.
        title: one line.
        across: the name of the horizontal axis, with its unit.
        kind: ``lines`` over the values of a numeric axis; ``dots`` beside the values of one that has no numbers; ``curves`` over what a run
            went through; ``scatter`` of single runs, with the diagonal.
        names: of all lines; their order decides colours and markers.
        panels: they share both axes.
        hidden: panels that are not drawn, because there are too many.
        log: whether the horizontal axis is logarithmic.
        marks: of the horizontal axis, with their labels.
        heights: round numbers that cover the accuracies.
    """

    name: str
    title: str
    across: str
    kind: Literal["lines", "dots", "curves", "scatter"]
    names: tuple[str, ...]
    panels: tuple[Panel, ...]
    hidden: int
    log: bool
    marks: tuple[tuple[float, str], ...]
    heights: tuple[float, ...]

    @property
    def drawn(self) -> tuple[str, ...]:
        """The lines that have something in some panel: those of the legend."""
        return tuple(name for name in self.names if any(name in panel.lines for panel in self.panels))


def axis_plots(content: Content, table: Sequence[Entry]) -> list[Plot]:
    """Accuracy against each axis that takes several values; the other axes make the panels."""
    plots = []
    for place in content.varying:
        others = tuple(other for other in content.varying if other != place)
        values = list(dict.fromkeys(setting[place] for setting in content.settings))
        numbers = [number for value in values if (number := finite(value)) is not None]
        numeric = len(numbers) == len(values)
        where = {value: numbers[n] if numeric else float(n) for n, value in enumerate(values)}
        panels: dict[tuple[str, ...], dict[str, list[Point]]] = {}
        titles: dict[tuple[str, ...], str] = {}
        for entry in table:
            key = tuple(entry.setting[other] for other in others)
            titles[key] = content.label(entry.setting, others)
            point = Point(where[entry.setting[place]], 100 * entry.mean, 100 * (entry.deviation or 0.0))
            panels.setdefault(key, {}).setdefault(entry.method, []).append(point)
        shown = tuple(
            Panel(titles[key], {name: sorted(points) for name, points in lines.items()}) for key, lines in list(panels.items())[:PANELS]
        )
        if not shown:
            continue
        axis = content.axes[place]
        plots.append(
            Plot(
                name=f"accuracy-by-{axis}",
                title=f"Accuracy by {axis}",
                across=axis,
                kind="lines" if numeric else "dots",
                names=content.methods,
                panels=shown,
                hidden=len(panels) - len(shown),
                log=numeric and min(numbers) > 0 and max(numbers) / min(numbers) > DECADE,
                marks=tuple(sorted((where[value], value or "–") for value in values)),
                heights=heights(shown),
            )
        )
    return plots


def ceiling_plot(content: Content) -> list[Plot]:
    """Every run's students against the ensemble that they learned from; nothing where there is no ensemble or no student."""
    runs: dict[str, dict[str, float]] = {}
    for result in content.finished:
        runs.setdefault(result.point, {})[result.method] = 100 * (result.accuracy or 0.0)
    present = dict.fromkeys(method for run in runs.values() for method in run)
    ensembles = [method for method in present if method.endswith(" ensemble")]
    students = tuple(method for method in content.methods if method.startswith("student"))
    if not ensembles or not students:
        return []
    ceiling = content.study.baseline if content.study.baseline in ensembles else ensembles[0]
    lines = {
        name: sorted(Point(run[ceiling], run[name], 0.0) for run in runs.values() if name in run and ceiling in run) for name in students
    }
    panels = (Panel("", {name: points for name, points in lines.items() if points}),)
    if not panels[0].lines:
        return []
    values = [value for points in panels[0].lines.values() for point in points for value in (point.x, point.y)]
    marks = tuple(within(min(values), max(values)))
    return [
        Plot(
            name="student-by-ensemble",
            title="Students and their ceiling, a mark a run",
            across=f"{ceiling}, accuracy (%)",
            kind="scatter",
            names=content.methods,
            panels=panels,
            hidden=0,
            log=False,
            marks=tuple((mark, f"{mark:g}") for mark in marks),
            heights=marks,
        )
    ]


def heights(panels: Sequence[Panel]) -> tuple[float, ...]:
    """Round numbers that cover every mean with its spread, in [0, 100]."""
    points = [point for panel in panels for line in panel.lines.values() for point in line]
    return within(min(point.y - point.spread for point in points), max(point.y + point.spread for point in points))


def within(low: float, high: float) -> tuple[float, ...]:
    """Round numbers that cover a range of per cents."""
    return tuple(tick for tick in ticks(max(0.0, low), min(100.0, high)) if 0 <= tick <= 100)
