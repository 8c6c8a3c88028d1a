"""Two pictures that a study makes of its runs' own, for papers: who holds what, and what was mined, setting by setting."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from sim.charts import short
from sim.study.content import Content
from sim.study.pictures import first_points, read_counts

DPI = 200
SHEETS = 6  # settings whose impressions stand on one picture
PARTITIONS = 24  # settings whose partitions do
SHEET_WIDTH = 900  # pixels


def new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """An empty figure that needs no screen; its sides are in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def partitions(content: Content) -> Figure | None:
    """Who holds what: a panel a setting, of its first seed; settings that share a partition share a panel."""
    found: dict[str, tuple[NDArray[np.int64], list[tuple[str, ...]]]] = {}
    for setting, point in first_points(content).items():
        counts = read_counts(content.folder / "points" / point)
        if counts is not None:
            found.setdefault(json.dumps(counts.tolist()), (counts, []))[1].append(setting)
    shown = list(found.values())[:PARTITIONS]
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(2.3 * columns + 0.7, 2.0 * rows + 0.3)
    most = max(int(counts.max(initial=1)) for counts, _ in shown)
    grid: Any = None
    every: list[Axes] = []
    for number, (counts, settings) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, number + 1)
        grid = axes.pcolormesh(counts.T, cmap="Blues", norm=PowerNorm(0.5, 0, most))  # counts are skewed, see sim.plots
        axes.invert_yaxis()
        axes.spines[:].set_color("#cccccc")
        axes.tick_params(length=0, labelsize=7)
        steps = [max(1, -(-side // 10)) for side in counts.shape]
        axes.set_xticks(np.arange(0, counts.shape[0], steps[0]) + 0.5, labels=[str(k) for k in range(0, counts.shape[0], steps[0])])
        axes.set_yticks(np.arange(0, counts.shape[1], steps[1]) + 0.5, labels=[str(k) for k in range(0, counts.shape[1], steps[1])])
        axes.set_title(short(_common(content, settings), 34), fontsize=8, loc="left", parse_math=False)
        if number + columns >= len(shown):
            axes.set_xlabel("client", fontsize=8)
        if number % columns == 0:
            axes.set_ylabel("class", fontsize=8)
        every.append(axes)
    bar = figure.colorbar(grid, ax=every, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label("images (square-root scale)", fontsize=8)
    return figure


def _common(content: Content, settings: Sequence[tuple[str, ...]]) -> str:
    """What settings have in common, in words."""
    same = [place for place in content.varying if len({setting[place] for setting in settings}) == 1]
    return content.label(settings[0], same) or (content.label(settings[0]) if len(settings) == 1 else "all settings")


def impressions(content: Content) -> Figure | None:
    """What was mined, method by method: the pictures of the first seed of a few settings, spread over all."""
    found = [(content.label(setting), path) for setting, point in first_points(content).items() if (path := _picture(content, point))]
    step = max(1, math.ceil(len(found) / SHEETS))
    sheets = []
    for label, path in found[::step]:
        try:
            with Image.open(path) as image:
                height = round(image.height * SHEET_WIDTH / image.width)
                sheets.append((label, np.asarray(image.convert("RGB").resize((SHEET_WIDTH, height), Image.Resampling.LANCZOS))))
        except (OSError, ValueError):  # damaged: the page says so
            continue
    if not sheets:
        return None
    columns = min(2, len(sheets))
    lines = [sheets[start : start + columns] for start in range(0, len(sheets), columns)]
    heights = [max(sheet.shape[0] for _, sheet in line) / DPI + 0.25 for line in lines]
    figure = new_figure(columns * SHEET_WIDTH / DPI, sum(heights), layout=None)
    top = 0.0
    for line, height in zip(lines, heights, strict=True):
        for column, (label, sheet) in enumerate(line):
            y = round((sum(heights) - top - 0.25) * DPI) - sheet.shape[0]
            figure.figimage(sheet, column * SHEET_WIDTH, y, origin="upper")
            x = (column + 28 / 1280) / columns
            figure.text(x, 1 - (top + 0.12) / sum(heights), short(label, 70), fontsize=8.5, va="center", parse_math=False)
        top += height
    return figure


def _picture(content: Content, point: str) -> Path | None:
    path = content.folder / "points" / point / "impressions.png"
    return path if path.exists() else None
