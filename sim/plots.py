"""The pictures of a run, drawn without a screen and without global state: the same input gives the same file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sim.charts import short
from sim.results import Sheet, replace_file

DPI = 128  # a power of two: whole pixels stay whole when they are divided and multiplied by it
GREY = "#666666"
ROWS, COLUMNS = 4, 10  # of a sheet of impressions
CELL, GAP, MARGIN = 112, 8, 28  # pixels


def draw_partition(counts: Any, class_names: Sequence[str], path: Path, title: str) -> None:
    """A heat map of how many images of each class each client holds, with the counts written in where there is room.

    Args:
        counts: clients x classes.
        class_names: one a class.
        path: of the PNG.
        title: one line above.
    """
    table = np.asarray(counts, dtype=np.int64).reshape(-1, len(class_names)).T
    classes, clients = table.shape
    wide, high = min(0.52, 9.6 / max(clients, 1)), min(0.34, 12 / classes)  # of a cell, in inches
    width, height = max(2.4, clients * wide), max(0.6, classes * high)
    names = [short(name, 18) for name in class_names]
    name_size = min(8.5, high * 72 * 0.85)
    left = 0.5 + max(len(name) for name in names) * name_size * 0.62 / 72
    total = (left + width + 0.95, height + 1.1)
    figure = _figure(total[0] * DPI, total[1] * DPI)
    axes = figure.add_axes((left / total[0], 0.55 / total[1], width / total[0], height / total[1]))
    lined = wide > 0.15 and high > 0.15
    most = max(1, int(table.max(initial=0)))
    shade = PowerNorm(0.5, 0, most)  # counts are skewed: on a linear scale most cells would look empty
    mesh = axes.pcolormesh(table, cmap="Blues", norm=shade, edgecolors="white" if lined else "none", linewidth=0.8 if lined else 0)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(classes) + 0.5, labels=names, fontsize=name_size, parse_math=False)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if s * wide > 0.2)
    shown = np.arange(0, clients, step)
    axes.set_xticks(shown + 0.5, labels=[str(client) for client in shown], fontsize=8)
    axes.set_xlabel("client", fontsize=9)
    axes.set_ylabel("class", fontsize=9)
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_color("#cccccc")
    beside = figure.add_axes(((left + width + 0.14) / total[0], 0.55 / total[1], 0.13 / total[0], height / total[1]))
    bar = figure.colorbar(mesh, cax=beside)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label("images (square-root scale)", fontsize=8)
    figure.text(left / total[0], 1 - 0.3 / total[1], short(title, int((width + 0.9) * 72 / 6.4)), fontsize=10.5, parse_math=False)

    size = min(8.0, wide * 72 * 0.88 / (0.64 * len(str(most))), high * 72 * 0.6)
    if size >= 5:
        for (row, column), count in np.ndenumerate(table):
            colour = "white" if (count / most) ** 0.5 > 0.6 else "#222222" if count else "#bbbbbb"
            axes.text(column + 0.5, row + 0.52, str(count), ha="center", va="center", fontsize=size, color=colour)
    save(figure, path)


def draw_impressions(sheets: Mapping[str, Sheet], path: Path) -> None:
    """Impressions side by side: a block a method, a column a class, a few images each, every pixel a square.

    Args:
        sheets: by method; of more than ten classes those with the lowest numbers are shown.
        path: of the PNG.
    """
    present = sorted({label for sheet in sheets.values() for label in sheet.labels.tolist()})
    blocks = [_Block(method, sheet, present) for method, sheet in sheets.items()]
    width = 2 * MARGIN + max((block.width for block in blocks), default=400)
    height = MARGIN + sum(block.height + MARGIN for block in blocks)
    figure = _figure(width, height)
    top = MARGIN
    for block in blocks:
        block.draw(figure, top)
        top += block.height + MARGIN
    save(figure, path)


class _Block:
    """One method's images, laid out in pixels so that no image is resampled."""

    title, heading, below = 34, 26, 26  # heights in pixels: of the method's name, the classes' names, the confidences

    def __init__(self, method: str, sheet: Sheet, present: Sequence[int]) -> None:
        labels, shown = sheet.labels.tolist(), present[:COLUMNS]
        self.places = [[place for place, label in enumerate(labels) if label == k][:ROWS] for k in shown]
        self.names = [sheet.class_names[k] for k in shown]
        self.caption = short(method, 60) + (f"  ({len(shown)} of {len(present)} classes)" if len(present) > len(shown) else "")
        self.images = _enlarged(sheet.images.detach().cpu().float().numpy())
        self.confidence = None if sheet.confidence is None else sheet.confidence.tolist()
        self.cell_height, self.cell_width = self.images.shape[1:3]
        self.pitch = self.cell_height + GAP + (self.below if self.confidence else 0)
        self.width = max(400, len(shown) * (self.cell_width + GAP) - GAP)
        self.height = self.title + self.heading + max(1, *map(len, self.places), 1) * self.pitch

    def draw(self, figure: Figure, top: int) -> None:
        width, height = (round(side * DPI) for side in figure.get_size_inches())

        def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
            figure.text(x / width, 1 - y / height, text, fontsize=size, va="center", parse_math=False, **style)

        write(MARGIN, top + 12, self.caption, 11, weight="bold")
        for column, (name, places) in enumerate(zip(self.names, self.places, strict=True)):
            x = MARGIN + column * (self.cell_width + GAP)
            middle = x + self.cell_width / 2
            write(middle, top + self.title + 11, short(name, self.cell_width // 9), 8.5, ha="center")
            if not places:
                write(middle, top + self.title + self.heading + 12, "none", 8, ha="center", color=GREY)
            for row, place in enumerate(places):
                y = top + self.title + self.heading + row * self.pitch
                figure.figimage(self.images[place], x, height - y - self.cell_height, vmin=0, vmax=1)
                if self.confidence:
                    write(middle, y + self.cell_height + 11, f"{100 * self.confidence[place]:.0f} %", 7, ha="center", color=GREY)


def _enlarged(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """NCHW to NHWC in RGB, every pixel repeated (or every nth kept) until an image is about ``CELL`` high; with a thin grey frame."""
    rgb = np.repeat(images, 3, 1) if images.shape[1] == 1 else images
    side = max(rgb.shape[2:])
    if side > 1.5 * CELL:
        rgb = rgb[:, :, :: round(side / CELL), :: round(side / CELL)]
    factor = max(1, round(CELL / side))
    large = rgb.repeat(factor, 2).repeat(factor, 3).transpose(0, 2, 3, 1).clip(0, 1)
    return np.pad(large, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.75)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(round(width) / DPI, round(height) / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a figure as PNG; the file appears whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})  # no version: the same bytes everywhere
    replace_file(path, content.getvalue())
