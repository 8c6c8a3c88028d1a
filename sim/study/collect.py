"""From the runs of a study to plain files: what repeats, and what it cost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedimpr.errors import ConfigError
from sim.config import composed
from sim.html import read
from sim.results import replace_file
from sim.study.plan import Point, Study
from sim.study.running import status_of

REPEATS = (
    "accuracy", "ratio", "images", "steps", "teacher_passes", "clients", "excluded", "bytes_down", "bytes_up", "simulated_seconds",
    "weights",
)  # fmt: skip
Rows = list[list[Any]]  # in the order of the columns: an axis may have the name of one
COSTS = ("seconds", "mining_seconds", "peak_memory_mb")


class Collected:
    """The rows of ``results.csv`` and ``costs.csv``; what has ended is read once.

    The first file holds what is the same whenever and wherever the runs are made again; the second what is not.

    Args:
        study: whose runs they are.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.folder = study, study.folder
        self._ended: dict[str, tuple[Rows, Rows]] = {}

    def write(self, points: Sequence[Point]) -> None:
        """Write both files, one row a run and method; a run without a result has one row, with its cause."""
        results, costs = list[list[Any]](), list[list[Any]]()
        for point in points:
            found = self._ended.get(point.name) or self._read(point)
            results += found[0]
            costs += found[1]
        axes = list(points[0].values)
        _write(self.folder / "results.csv", ["point", *axes, "status", "cause", "method", *REPEATS, "config_hash", "command"], results)
        _write(self.folder / "costs.csv", ["point", "method", *COSTS, "wall_seconds"], costs)

    def _read(self, point: Point) -> tuple[Rows, Rows]:
        folder = self.folder / "points" / point.name
        status, run, rows = status_of(folder), read(folder / "run.json", json.loads), read(folder / "summary.json", json.loads)
        run = run if isinstance(run, Mapping) else {}
        rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
        cause = " ".join(str(run.get("error") or "").split())
        if status == "finished" and not rows:
            status, cause = "failed", "summary.json is missing or damaged"
        if status != "finished":
            rows = []  # what a run has found so far depends on when it stopped
        head = [point.name, *point.values.values(), status, cause]
        tail = [run.get("config_hash"), point.command]
        results = [[*head, row.get("method"), *(row.get(key) for key in REPEATS), *tail] for row in rows or [{}]]
        costs = [[point.name, row.get("method"), *(row.get(key) for key in COSTS), None] for row in rows]
        if (seconds := run.get("wall_seconds")) is not None:
            costs.append([point.name, None, None, None, run.get("peak_memory_mb"), seconds])
        if status in ("finished", "failed"):
            self._ended[point.name] = results, costs
        return results, costs


def begin(study: Study, points: Iterable[Point], command: str, configs: str) -> None:
    """Write ``study.json``, or see that the one that is there is of the same study.

    Axes and seeds may have got more values, or fewer. What all runs share must be the same, and so must be the settings of those that have
    finished, where a file of the configuration has changed since.

    Args:
        study: that is to run.
        points: of it.
        command: that was typed.
        configs: tells whether a file of the configuration has changed.

    Raises:
        ConfigError: the folder holds another study, or something else.
    """
    path, now = study.folder / "study.json", study.asked()
    before = read(path, json.loads)
    if path.exists() and not isinstance(before, dict):
        raise ConfigError("study.output", str(study.folder), "a folder whose study.json is whole; delete that file to go on with the runs")
    if not path.exists() and (study.folder / "run.json").exists():
        raise ConfigError("study.output", str(study.folder), "a folder of its own: this one holds a run")
    for key in ("name", "base", "axes"):
        if before and (was := list(before.get(key, ()))) != (wanted := list(now[key])):
            raise ConfigError("study.output", str(study.folder), f"a folder of the same study; here '{key}' was {was}, and now is {wanted}")
    if before and before.get("configs") != configs:
        _check_finished(study, points)
    replace_file(path, (json.dumps({**now, "command": command, "configs": configs}, indent=1, ensure_ascii=False) + "\n").encode())


def _check_finished(study: Study, points: Iterable[Point]) -> None:
    """See that runs that have finished are still what the configuration says."""
    for point in points:
        folder = study.folder / "points" / point.name
        if status_of(folder) == "finished" and composed(point.overrides).hash() != read(folder / "run.json", json.loads).get("config_hash"):
            raise ConfigError(
                "study.output",
                str(study.folder),
                f"a folder of the same study: the configuration has changed since {point.name} finished (compare its config.yaml)",
            )


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())
