"""A study's figures as inline SVG for its page, which gives them their colours, light or dark."""

from __future__ import annotations

import math
from html import escape

from sim.charts import COLOURS, POINTS, short
from sim.study.series import Panel, Plot, Point

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 38, 14, 12, 38  # of the plotting area, in SVG units
INSIDE = 16  # between the plotting area's edge and the first value
APART = 4  # between the lines of two methods at one value, so that their spreads do not hide each other
ROW = 10  # of a method beside a value without number
LETTER = 6.4  # the width of a letter at 11 px, roughly
FEW = 15  # points of a curve that get a marker

# Around a point, about 7 units wide: a circle, a square, a triangle, a diamond, another triangle, a plus, a cross, a hexagon.
MARKERS = (
    "m-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0z",
    "m-3-3h6v6h-6z",
    "m0-4l3.9 6.8h-7.8z",
    "m0-4.3l4.3 4.3-4.3 4.3-4.3-4.3z",
    "m0 4l3.9-6.8h-7.8z",
    "m-1.2-4h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
    "m0-1.7l2.3-2.3 1.7 1.7-2.3 2.3 2.3 2.3-1.7 1.7-2.3-2.3-2.3 2.3-1.7-1.7 2.3-2.3-2.3-2.3 1.7-1.7z",
    "m-4 0l2-3.5h4l2 3.5-2 3.5h-4z",
)


def marker(number: int) -> int:
    """Which marker a line has: where colours repeat, markers differ."""
    return (number + number // COLOURS) % len(MARKERS)


def draw(plot: Plot) -> str:
    """A ``<figure>``: its title, its legend, and an SVG a panel."""
    panels = "".join(
        f"<div>{f'<p>{escape(panel.title)}</p>' if panel.title else ''}{_svg(plot, panel, escape(_said(plot, panel)))}</div>"
        for panel in plot.panels
    )
    hidden = f'<p class="soft">{plot.hidden:,} more are not drawn.</p>' if plot.hidden else ""
    kind = {1: "plot single", 2: "plot even", 4: "plot even"}.get(len(plot.panels), "plot")
    how = {
        "lines": "mean and standard deviation over seeds",
        "dots": "mean and standard deviation over seeds",
        "curves": "mean and standard deviation over seeds",
        "scatter": "on the dashed line a student is as good as its ensemble",
    }[plot.kind]
    return (
        f'<figure class="{kind}"><figcaption><b>{escape(plot.title)}</b> · in %, {how}</figcaption>'
        f'<p class="keys">{"".join(map(_key, (plot.names.index(name) for name in plot.drawn), plot.drawn))}</p>'
        f'<div class="charts">{panels}</div>{hidden}</figure>\n'
    )


def _key(number: int, name: str) -> str:
    return f'<span><svg viewBox="-7 -7 14 14" aria-hidden="true">{_mark(number, 0, 0)}</svg>{escape(name)}</span>'


def _mark(number: int, x: float, y: float, said: str = "") -> str:
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<path class="mark c{number % COLOURS}" d="M{x:.1f} {y:.1f}{MARKERS[marker(number)]}"' + (f">{title}</path>" if title else "/>")


def _said(plot: Plot, panel: Panel) -> str:
    best = {name: max(points, key=lambda point: point.y) for name, points in panel.lines.items()}
    told = "; ".join(f"{name} at most {point.y:.1f}" for name, point in best.items())
    return f"{plot.title}{', ' if panel.title else ''}{panel.title}: {told}"


def _svg(plot: Plot, panel: Panel, said: str) -> str:
    if plot.kind == "dots":
        return _rows(plot, panel, said)
    low, high = plot.heights[0], plot.heights[-1]
    first, last = plot.marks[0][0], plot.marks[-1][0]
    inside = INSIDE if plot.kind == "lines" else 0

    def scale(x: float) -> float:
        return math.log(x) if plot.log else x

    def across(x: float) -> float:
        return LEFT + inside + (scale(x) - scale(first)) / (scale(last) - scale(first)) * (WIDTH - LEFT - RIGHT - 2 * inside)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in plot.heights:
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    taken = -math.inf
    for value, label in plot.marks:
        x, half = across(value), len(short(label, 12)) * LETTER / 2
        if x - half > taken + 4:
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(short(label, 12))}</text>')
            taken = x + half
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(plot.across)}</text>')
    if plot.kind == "scatter":
        parts.append(f'<path class="diagonal" d="M{across(low):.1f} {up(low):.1f}L{across(high):.1f} {up(high):.1f}"/>')
    numbers = {name: plot.names.index(name) for name in panel.lines}
    for place, (name, line) in enumerate(panel.lines.items()):
        number, points = numbers[name], line[:: math.ceil(len(line) / POINTS)]
        aside = APART * (place - (len(panel.lines) - 1) / 2) if plot.kind == "lines" else 0
        places = [(across(point.x) + aside, up(point.y)) for point in points]
        if plot.kind == "curves" and len(points) > 1:
            upper = [f"{x:.1f} {up(point.y + point.spread):.1f}" for (x, _), point in zip(places, points, strict=True)]
            lower = [f"{x:.1f} {up(point.y - point.spread):.1f}" for (x, _), point in zip(places, points, strict=True)]
            parts.append(f'<path class="band c{number % COLOURS}" d="M{"L".join(upper + lower[::-1])}z"/>')
        if plot.kind != "scatter" and len(points) > 1:
            parts.append(f'<path class="c{number % COLOURS}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        for (x, y), point in zip(places, points, strict=True):
            if plot.kind == "lines" and point.spread:
                ends = f"M{x:.1f} {up(point.y - point.spread):.1f}V{up(point.y + point.spread):.1f}"
                parts.append(f'<path class="spread c{number % COLOURS}" d="{ends}"/>')
            if plot.kind != "curves" or len(points) <= FEW:
                parts.append(_mark(number, x, y, _told(name, point) if plot.kind == "lines" else ""))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(parts)}</svg>'


def _rows(plot: Plot, panel: Panel, said: str) -> str:
    """Values without numbers stand below each other, so that their names have room, and accuracies run to the right."""
    names = [short(label, 22) for _, label in plot.marks]
    left, row = max(LEFT, round(max(map(len, names)) * LETTER) + 14), ROW * len(plot.drawn) + 8
    height = TOP + row * len(names) + BOTTOM
    low, high = plot.heights[0], plot.heights[-1]

    def across(y: float) -> float:
        return left + (min(max(y, low), high) - low) / (high - low) * (WIDTH - left - RIGHT)

    parts = []
    for tick in plot.heights:
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {TOP}V{height - BOTTOM}"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{height - 4}" text-anchor="middle">accuracy (%)</text>')
    for place, name in enumerate(names):
        parts.append(f'<path class="grid" d="M4 {TOP + row * (place + 1)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{left - 6}" y="{TOP + row * (place + 0.5) + 4}" text-anchor="end">{escape(name)}</text>')
    for place, name in enumerate(plot.drawn):
        number = plot.names.index(name)
        for point in panel.lines.get(name, ()):
            y = TOP + row * point.x + 4 + ROW * (place + 0.5)
            if point.spread:
                ends = f"M{across(point.y - point.spread):.1f} {y:.1f}H{across(point.y + point.spread):.1f}"
                parts.append(f'<path class="spread c{number % COLOURS}" d="{ends}"/>')
            parts.append(_mark(number, across(point.y), y, _told(name, point)))
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{said}">{"".join(parts)}</svg>'


def _told(name: str, point: Point) -> str:
    return f"{name}: {point.y:.2f}" + (f" ± {point.spread:.2f}" if point.spread else "")
