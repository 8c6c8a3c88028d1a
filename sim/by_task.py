"""What a model knows of every task after every task: measured, written down and drawn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedimpr.continual.course import Course
from fedimpr.continual.measures import describe
from fedimpr.evaluation import Score, evaluate
from sim.results import replace_file

FILE, PICTURE = "continual.json", "accuracy_matrix.png"
INITIAL = "initial"  # the stage of the line that tells what the initial model knows


def score(model: nn.Module, course: Course, step: int) -> tuple[Score, list[float | None]]:
    """Score a model of a step: on all images of the tasks so far, and on each task; ``None`` where a class is not known yet."""
    known, test = course.classes(step), course.data.test
    each = [evaluate(model, test.subset(task.test)) if max(task.seen) < known else None for task in course.tasks]
    sizes = [len(task.test) for task in course.tasks[: step + 1]]
    seen = [one for one in each[: step + 1] if one is not None]
    mean = Score(*(sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes) for values in zip(*seen, strict=True)))
    return mean, [None if one is None else one.accuracy for one in each]


def matrices(lines: Iterable[Mapping[str, Any]], course: Course) -> dict[str, Tensor]:
    """The accuracy matrix (T', T') of every candidate after the T' tasks that are over, from a run's metrics; nan: not measured."""
    rows: dict[str, dict[int, list[float]]] = {}
    for line in lines:
        if line.get("stage") == "candidate" and "tasks" in line and course.ends(line["round"]):
            values = [float("nan") if value is None else float(value) for value in line["tasks"]]
            rows.setdefault(str(line["method"]), {})[course.step(line["round"])] = values
    whole = {name: [found[step] for step in range(len(found))] for name, found in rows.items() if set(found) == set(range(len(found)))}
    return {name: torch.tensor(found)[:, : len(found)] for name, found in whole.items()}


def write_matrices(folder: Path, lines: Sequence[Mapping[str, Any]], course: Course) -> None:
    """Write ``continual.json``, a matrix and its measures for every candidate, and the picture of them; nothing before a task is over."""
    found = matrices(lines, course)
    if not found:
        return
    sizes = torch.tensor([len(task.test) for task in course.tasks])
    start = next((torch.tensor(line["tasks"]) for line in lines if line.get("stage") == INITIAL), None)
    told = {}
    for name, matrix in found.items():
        over = len(matrix)
        measures = describe(matrix, test_images=sizes[:over], initial=None if start is None else start[:over])
        told[name] = {"measures": measures, "matrix": [[None if v != v else round(v, 6) for v in row] for row in matrix.tolist()]}
    replace_file(folder / FILE, (json.dumps({"tasks": [task.name for task in course.tasks], "methods": told}, indent=1) + "\n").encode())
    draw_matrices(found, [task.name for task in course.tasks], folder / PICTURE)


def draw_matrices(found: Mapping[str, Tensor], names: Sequence[str], path: Path) -> None:
    """The accuracy matrices side by side: a row after each task, a column for each task.

    Args:
        found: by method, (T, T) in [0, 1].
        names: of the tasks.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sim.plots import save

    tasks = max(map(len, found.values()))
    side = max(2.2, 0.62 * tasks)
    figure = Figure(figsize=((side + 0.9) * len(found) + 0.4, side + 1.5), facecolor="white", layout="compressed")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, matrix) in zip(panels, found.items(), strict=True):
        values = np.ma.masked_invalid(matrix.numpy())
        axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            if value == value and tasks <= 12:
                axes.text(
                    column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "#222222"
                )
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.set_xticks(range(len(matrix)), labels=[short_name(n) for n in names[: len(matrix)]], fontsize=7, rotation=45, parse_math=False)
        axes.set_yticks(range(len(matrix)), labels=[str(n + 1) for n in range(len(matrix))], fontsize=7)
        axes.set_xlabel("accuracy (%) on task", fontsize=8)
        axes.set_ylabel("after task", fontsize=8)
    save(figure, path)


def short_name(name: str) -> str:
    """A task's name on an axis."""
    return name if len(name) <= 14 else name[:13] + "…"
