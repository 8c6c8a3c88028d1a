"""A study's figures as PNG files, for papers; its page draws its own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from sim.charts import COLOURS, LIGHT, short
from sim.plots import save
from sim.study.content import Damage
from sim.study.curves import all_plots
from sim.study.drawing import FEW, marker
from sim.study.mosaics import DPI, impressions, new_figure, partitions
from sim.study.reading import read_study
from sim.study.series import Panel, Plot
from sim.study.statistics import entries

MARKERS = "os^DvPXh"  # as sim.study.drawing.MARKERS


def write_figures(folder: Path) -> list[Path]:
    """Write ``figures/*.png``, each where the folder holds the data for it; figures that it had before are removed.

    Raises:
        FedimprError: a file cannot be written.
    """
    content = read_study(folder)
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    drawn: dict[str, Figure] = {plot.name: draw(plot) for plot in all_plots(content, entries(content), Damage())}
    drawn |= {name: figure for name, figure in (("partitions", partitions(content)), ("impressions", impressions(content))) if figure}
    paths = []
    for name, figure in drawn.items():
        paths.append(target / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.png")
        save(figure, paths[-1], DPI)
    return paths


def draw(plot: Plot) -> Figure:
    """Panels that share their axes, with one legend below."""
    columns = 2 if len(plot.panels) == 4 else min(3, len(plot.panels))
    rows = math.ceil(len(plot.panels) / columns)
    row = 0.12 * len(plot.drawn) + 0.1  # inches of a value without number
    height = 0.7 + row * len(plot.marks) if plot.kind == "dots" else 2.5
    width = 3.4 if plot.kind == "scatter" else 4.4 if columns == 1 else 3.1
    figure = new_figure(width * columns, height * rows + 0.6)
    for number, panel in enumerate(plot.panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(color="#999999", labelsize=8)
        axes.set_title(short(panel.title, int(width * 12)), fontsize=9, loc="left", parse_math=False)
        first, last = number % columns == 0, number + columns >= len(plot.panels)
        if plot.kind == "dots":
            _rows(axes, plot, panel, names=first, numbers=last)
        else:
            _lines(axes, plot, panel, names=first, numbers=last)
    handles = [
        Line2D([], [], color=_colour(n), marker=MARKERS[marker(n)], markersize=5, linewidth=0 if plot.kind in ("dots", "scatter") else 1.4)
        for n in map(plot.names.index, plot.drawn)
    ]
    across = max(1, min(len(handles), int(width * columns / 1.75)))
    legend = figure.legend(handles, plot.drawn, loc="outside lower center", ncols=across, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _lines(axes: Axes, plot: Plot, panel: Panel, *, names: bool, numbers: bool) -> None:
    axes.set_ylim(plot.heights[0], plot.heights[-1])
    axes.set_yticks(plot.heights)
    if plot.log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(*zip(*_roomy(plot), strict=True), parse_math=False)
    if plot.kind == "scatter":
        axes.plot(
            plot.heights[:: len(plot.heights) - 1],
            plot.heights[:: len(plot.heights) - 1],
            color="#999999",
            linewidth=0.9,
            linestyle=(0, (4, 3)),
        )
        axes.set_aspect("equal")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelleft=names, labelbottom=numbers)
    for place, (name, points) in enumerate(panel.lines.items()):
        number = plot.names.index(name)
        x, y, spread = (np.array(values) for values in zip(*points, strict=True))
        colour, where = _colour(number), axes.transData
        mark = MARKERS[marker(number)] if plot.kind != "curves" or len(points) <= FEW else None
        if plot.kind == "lines":  # a little aside of each other, so that the spreads do not hide each other
            aside = ScaledTranslation(3 * (place - (len(panel.lines) - 1) / 2) / 72, 0, axes.figure.dpi_scale_trans)
            where = axes.transData + aside
            axes.vlines(x, (y - spread).clip(0), (y + spread).clip(0, 100), color=colour, linewidth=1, alpha=0.7, transform=where)
        elif plot.kind == "curves":
            axes.fill_between(x, (y - spread).clip(0), (y + spread).clip(0, 100), color=colour, alpha=0.15, linewidth=0)
        width = 0 if plot.kind == "scatter" else 1.4
        axes.plot(x, y, color=colour, linewidth=width, marker=mark, markersize=4.5, clip_on=False, transform=where)
    first, last = plot.marks[0][0], plot.marks[-1][0]
    if plot.kind == "lines":
        spare = (last / first) ** 0.06 if plot.log else (last - first) * 0.06
        axes.set_xlim((first / spare, last * spare) if plot.log else (first - spare, last + spare))
    else:
        axes.set_xlim(first, last)
    if names:
        axes.set_ylabel("student, accuracy (%)" if plot.kind == "scatter" else "accuracy (%)", fontsize=9)
    if numbers:
        axes.set_xlabel(plot.across, fontsize=9, parse_math=False)


def _rows(axes: Axes, plot: Plot, panel: Panel, *, names: bool, numbers: bool) -> None:
    """Values without numbers stand below each other, so that their names have room, and accuracies run to the right."""
    axes.set_xlim(plot.heights[0], plot.heights[-1])
    axes.set_xticks(plot.heights)
    axes.set_ylim(len(plot.marks) - 0.5, -0.5)
    axes.set_yticks(range(len(plot.marks)), [short(label, 22) for _, label in plot.marks], parse_math=False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelleft=names)
    axes.tick_params(axis="x", labelbottom=numbers)
    for edge in range(1, len(plot.marks)):
        axes.axhline(edge - 0.5, color="#d0d0d0", linewidth=0.7)
    for place, name in enumerate(plot.drawn):
        number = plot.names.index(name)
        for x, y, spread in panel.lines.get(name, ()):
            height = x + (place - (len(plot.drawn) - 1) / 2) * 0.8 / len(plot.drawn)
            axes.hlines(height, max(0.0, y - spread), min(100.0, y + spread), color=_colour(number), linewidth=1, alpha=0.7)
            axes.plot(y, height, color=_colour(number), marker=MARKERS[marker(number)], markersize=4.5, clip_on=False)
    if numbers:
        axes.set_xlabel("accuracy (%)", fontsize=9)


def _roomy(plot: Plot) -> list[tuple[float, str]]:
    """The marks whose labels do not run into each other."""
    first, last = (math.log(x) if plot.log else x for x in (plot.marks[0][0], plot.marks[-1][0]))
    chosen, taken = [], -math.inf
    for value, label in plot.marks:
        at, half = ((math.log(value) if plot.log else value) - first) / ((last - first) or 1), 0.014 * len(short(label, 12))
        if at - half > taken:
            chosen.append((value, short(label, 12)))
            taken = at + half + 0.02
    return chosen


def _colour(number: int) -> str:
    return LIGHT[number % COLOURS]
