"""Reads a study's folder as far as it is there: what is damaged becomes one line, and the rest is read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.study.content import Content, Damage, Result, Study, finite

NEEDED = ("point", "seed", "status", "method", "accuracy")  # columns of results.csv without which nothing can be told


def read_study(folder: Path) -> Content:
    """What the folder's ``study.json``, ``results.csv`` and ``costs.csv`` say; whatever is missing or damaged becomes a notice."""
    damage = Damage()
    study = _study(folder, damage)
    head, lines = _table(folder / "results.csv", NEEDED, damage)
    axes = tuple(head[1 : head.index("seed")]) if head else tuple(study.axes)
    costs_head, costs = _table(folder / "costs.csv", ("point", "method"), damage, optional=True)
    numbers = [name for name in costs_head if name not in ("point", "method")]
    return Content(
        folder=folder,
        study=study,
        axes=axes,
        results=_results(head, lines, damage),
        costs={
            (line["point"], line["method"]): {name: value for name in numbers if (value := finite(line[name])) is not None}
            for line in (dict(zip(costs_head, row, strict=True)) for _, row in costs)
        },
        notices=tuple(damage.lines()),
    )


def _study(folder: Path, damage: Damage) -> Study:
    tree: Any = None
    try:
        tree = json.loads((folder / "study.json").read_bytes())
    except FileNotFoundError:
        damage.add("study.json", "it is missing, so neither the question nor the number of runs is known")
    except (OSError, ValueError, RecursionError) as error:
        damage.add("study.json", f"it cannot be read ({_said(error)}), so neither the question nor the number of runs is known")
    else:
        if not isinstance(tree, dict):
            damage.add("study.json", "it is no JSON object, so neither the question nor the number of runs is known")
    tree = tree if isinstance(tree, dict) else {}
    axes = tree.get("axes") if isinstance(tree.get("axes"), dict) else {}
    baseline = tree.get("baseline")
    return Study(
        name=str(tree.get("name") or folder.resolve().name),
        question=str(tree.get("question") or ""),
        base=_texts(tree.get("base")),
        axes={str(key): _texts(values) for key, values in axes.items()},
        seeds=_texts(tree.get("seeds")),
        compare=_texts(tree.get("compare")),
        baseline=None if baseline is None else str(baseline),
        command=str(tree.get("command") or ""),
    )


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values) if isinstance(values, list) else ()


def _table(path: Path, needed: Sequence[str], damage: Damage, *, optional: bool = False) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The head of a CSV file, and its whole lines with their numbers in the file; neither where a needed column is missing."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        if not optional:
            damage.add(path.name, "it is missing, so there is nothing to show yet")
        return [], []
    except OSError as error:
        damage.add(path.name, f"it cannot be read ({_said(error)})")
        return [], []
    whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(whole, newline=""))
    head: list[str] | None = None
    lines: list[tuple[int, list[str]]] = []
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            damage.add(path.name, f"line {first} is damaged ({error}) and left out")
            continue
        if head is None:
            head = row
        elif len(row) == len(head):
            lines.append((first, row))
        elif row:
            damage.add(path.name, f"line {first} has {len(row)} fields where the head has {len(head)}, and is left out")
    if whole != text:
        damage.add(path.name, f"line {whole.count(chr(10)) + 1} is cut off and left out")
    head = head or [""]
    if lost := [name for name in needed if name not in head]:
        damage.add(path.name, f"its head has no column {', '.join(lost)}")
        return [], []
    if head[0] != "point":
        damage.add(path.name, f"its first column is {head[0]!r} where point belongs")
        return [], []
    return head, lines


def _results(head: Sequence[str], lines: Sequence[tuple[int, Sequence[str]]], damage: Damage) -> tuple[Result, ...]:
    """The lines that make sense; a method that a point has twice counts once."""
    found: dict[tuple[str, str], Result] = {}
    for number, row in lines:
        first = head.index("seed")
        line, point, setting = dict(zip(head[first:], row[first:], strict=True)), row[0], tuple(row[1:first])
        accuracy, method = finite(line["accuracy"]), line["method"]
        if Path(point).name != point or point in ("", "..") or "\0" in point:
            damage.add("results.csv", f"line {number} names no point ({point!r}), and is left out")
        elif line["accuracy"] and (accuracy is None or not 0 <= accuracy <= 1):
            damage.add(
                "results.csv", f"line {number} has an accuracy of {line['accuracy']!r} where a number in [0, 1] belongs, and is left out"
            )
        elif (point, method) in found:
            damage.add("results.csv", f"line {number} says again what {point} has of {method or 'no method'}, and is left out")
        else:
            found[point, method] = Result(point, setting, line["seed"], line["status"], line.get("cause", ""), method, accuracy, line)
    return tuple(found.values())


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
