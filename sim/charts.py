"""Small line charts as inline SVG, which takes its colours from the page and so follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 10, 34  # of the plotting area, in SVG units
AXES = ("step", "epoch", "round")  # what may run along the horizontal axis, best first
SERIES = ("client", "method")
# Of lines on white and on dark, .c0 ... .c7 in a style sheet; also those who lack one of the eye's three receptors tell them apart.
LIGHT = ("#1352c2", "#d9730d", "#0a8455", "#b565ac", "#4e3580", "#7a3b12", "#2485da", "#6e757b")
DARK = ("#6ba7f8", "#f3a454", "#4ed1a0", "#ea7fc6", "#ccc2ff", "#c58a62", "#2588cc", "#9aa4a3")
COLOURS = len(LIGHT)
POINTS = 400  # drawn per line at most

Lines = dict[str, list[tuple[float, float]]]


def charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A ``<figure>`` for each loss, accuracy and fidelity of each stage; stages with one value only have none.

    Args:
        metrics: lines of ``metrics.jsonl``. The horizontal axis is the step, epoch or round, whichever takes several values, else the
            client; each client or method is one line.
    """
    figures = []
    for stage in dict.fromkeys(str(line.get("stage")) for line in metrics):
        mine = [line for line in metrics if str(line.get("stage")) == stage]
        axis = next((key for key in (*AXES, "client") if len({line[key] for line in mine if _number(line.get(key))}) > 1), None)
        if axis is None:
            continue
        for value in dict.fromkeys(key for line in mine for key in line if key.endswith(("loss", "accuracy", "fidelity"))):
            lines: Lines = {}
            for line in mine:
                if _number(line.get(axis)) and _number(line.get(value)):
                    name = ", ".join(f"{key} {line[key]}" for key in SERIES if key in line and key != axis)
                    lines.setdefault(name, []).append((float(line[axis]), float(line[value])))
            if any(len(points) > 1 for points in lines.values()):
                figures.append(_figure(f"{stage}: {value.replace('_', ' ')}", axis, lines, dots=axis == "client"))
    return figures


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that cover ``[low, high]``, ``count`` at most or one more."""
    span = high - low or abs(high) or 1.0
    rough = span / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def short(text: str, length: int) -> str:
    """One line of at most ``length`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: max(1, length - 1)] + "…"


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(title: str, axis: str, lines: Lines, *, dots: bool) -> str:
    points = [point for line in lines.values() for point in line]
    rows = ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    margin = 0.5 if dots else 0.0
    x0, x1 = min(x for x, _ in points) - margin, max(x for x, _ in points) + margin
    columns = [tick for tick in ticks(x0, x1) if x0 <= tick <= x1 and tick == int(tick)]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - rows[0]) / (rows[-1] - rows[0]) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for tick in rows:
        y = place(x0, tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.5g}</text>')
    for tick in columns:
        parts.append(f'<text x="{place(tick, rows[0])[0]}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:,.5g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(axis)}</text>')
    for number, line in enumerate(lines.values()):
        places = [place(x, y) for x, y in sorted(line)[:: math.ceil(len(line) / POINTS)]]
        colour = f"c{number % COLOURS}"
        if dots:
            base = place(x0, 0)[1]
            for x, y in places:
                parts.append(f'<path class="{colour}" d="M{x} {base}V{y}"/><circle class="{colour}" cx="{x}" cy="{y}" r="3.5"/>')
        else:
            parts.append(f'<polyline class="{colour}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
    said = f"{title} by {axis}, between {min(y for _, y in points):.4g} and {max(y for _, y in points):.4g}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>{_legend(list(lines))}</figure>'
    )


def _legend(names: Sequence[str]) -> str:
    if names == [""]:
        return ""
    if len(names) > COLOURS:  # colours repeat: they would not tell the lines apart
        return f'<p class="legend">{len(names)} lines, {escape(names[0])} to {escape(names[-1])}</p>'
    return '<p class="legend">' + " ".join(f'<span class="c{n}">{escape(name)}</span>' for n, name in enumerate(names)) + "</p>"
