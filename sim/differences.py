"""What differs between two runs, in words and Markdown tables; for :mod:`sim.compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sim.config import DECIDE_NOTHING, flat
from sim.curves import curves, partings, words
from sim.folders import Found, Stored
from sim.tables import markdown

SHOWN = 20  # lines of a table that may become long
DIGITS = 12  # of a hash
NONE = "-"
# Of a row: all else is what a method cost. Its memory is that of the process so far, so the run's own says all.
NO_COSTS = ("method", "accuracy", "ratio", "transfer", "notes", "weights", "note", "peak_memory_mb")


def described(one: Found, two: Found) -> tuple[str, bool]:
    """What differs, and whether the results are the same: weights, accuracies, and all numbers of the metrics that no clock measured."""
    weights = (one.weights(), two.weights())
    verdict, same_weights = _verdict(one, two, *weights)
    results, same_results = _results(one, two)
    parting, same_curves = _curves(one, two)
    folders = markdown(
        ("", "run", "status"), [(found.name, found.folder, (found.run or {}).get("status", NONE)) for found in (one, two)], left=3
    )
    sections = [
        verdict,
        folders,
        *_settings(one, two),
        _table("Versions and machine", _keys(_around(one), _around(two)), one.run, two.run),
        _partition(one, two),
        _weights(*weights),
        results,
        _costs(one, two),
        parting,
    ]
    return "\n\n".join(sections), same_weights and same_results and same_curves


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}"


def _table(title: str, rows: Sequence[tuple[str, ...]], *read: object) -> str:
    if None in read:
        return _section(title, "Not compared.")
    return _section(title, markdown(("", "A", "B"), rows, left=3) if rows else "The same.")


def _keys(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The keys whose values differ, with both values."""
    keys = [key for key in dict.fromkeys([*one, *two]) if key not in one or key not in two or one[key] != two[key]]
    return [(key, *(json.dumps(side[key], ensure_ascii=False) if key in side else NONE for side in (one, two))) for key in keys]


def _settings(one: Found, two: Found) -> list[str]:
    old, new = one.config or {}, two.config or {}
    rows = _keys(flat(old), flat(new))
    if not rows and json.dumps(old) != json.dumps(new):  # whose student leads is decided by the order of methods
        rows = [("order of synthesis", *(", ".join(tree.get("synthesis", {})) for tree in (old, new)))]
    idle = [row for row in rows if row[0].split(".")[0] in DECIDE_NOTHING]
    deciding, idle = [row for row in rows if row not in idle], [row for row in idle if row[0] != "output"]  # which is where it stands
    read = (one.config, two.config)
    return [_table("Settings", deciding, *read), _table("Settings that decide no result", idle, *read)]


def _around(found: Found) -> dict[str, Any]:
    return flat({key: (found.run or {}).get(key, {}) for key in ("versions", "machine")})


def _partition(one: Found, two: Found) -> str:
    if one.manifest is None or two.manifest is None:
        return _section("Partition", "Not compared.")
    old, new = ({key: value for key, value in side.items() if key not in ("counts", "sizes")} for side in (one.manifest, two.manifest))
    return _table("Partition", _keys(flat(old), flat(new)))


def _verdict(one: Found, two: Found, first: Mapping[str, Stored], second: Mapping[str, Stored]) -> tuple[str, bool]:
    """One line on the weights, and whether they are the same."""
    hashes = [
        {
            (line["round"], line["method"]): line["weights"]
            for line in found.metrics or ()
            if line.get("stage") == "candidate" and {"round", "method", "weights"} <= line.keys()
        }
        for found in (one, two)
    ]
    old, new = hashes
    both = first.keys() & second.keys()
    if parted := [key[0] for key in old.keys() & new.keys() if old[key] != new[key]]:
        return f"weights differ from round {min(parted)} on", False
    if old and new and (last := [max(key[0] for key in side) for side in hashes])[0] != last[1]:
        return f"same weights up to round {min(last)}, where {'A' if last[0] < last[1] else 'B'} ends", False
    if any(first[name].hash != second[name].hash for name in both):
        return "weights differ", False
    if not both:
        return "no weights to compare", not first and not second
    if first.keys() != second.keys():
        return "same weights of all candidates that both have", False
    return "same weights", True


def _weights(first: Mapping[str, Stored], second: Mapping[str, Stored]) -> str:
    rows, tensors = [], []
    for name in dict.fromkeys([*first, *second]):
        sides = (first.get(name), second.get(name))
        largest = NONE
        if sides[0] is not None and sides[1] is not None:
            found = [] if sides[0].hash == sides[1].hash else _tensors(sides[0], sides[1])
            tensors += [(name, *row) for row in found]
            largest = found[0][1] if found else "0"
        rows.append((name, *(NONE if side is None else side.hash[:DIGITS] for side in sides), largest))
    if not rows:
        return _section("Weights", "None.")
    text = markdown(("candidate", "A", "B", "largest difference"), rows)
    return _section("Weights", text + ("\n\n" + _cut(("candidate", "tensor", "largest difference"), tensors, left=2) if tensors else ""))


def _tensors(first: Stored, second: Stored) -> list[tuple[str, str]]:
    """The tensors that differ, each with its largest absolute difference; those that cannot be subtracted and large differences first."""
    found: list[tuple[float, str, str]] = []
    for name in dict.fromkeys([*first, *second]):
        if name not in first or name not in second:
            found.append((float("inf"), name, f"only in {'A' if name in first else 'B'}"))
            continue
        a, b = first[name], second[name]
        if a.shape != b.shape:
            found.append((float("inf"), name, f"{tuple(a.shape)} and {tuple(b.shape)}"))
        elif a.dtype != b.dtype or not torch.equal(a, b):
            largest = _largest(a, b)
            found.append((largest, name, f"{largest:.3g}"))
    return [(name, text) for _, name, text in sorted(found, key=lambda one: -one[0])]


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _cut(head: Sequence[str], rows: Sequence[Sequence[object]], left: int) -> str:
    more = len(rows) - SHOWN
    return markdown(head, rows[:SHOWN], left=left) + (f"\n\nAnd {more} more." if more > 0 else "")


def _results(one: Found, two: Found) -> tuple[str, bool]:
    if one.rows is None or two.rows is None:
        return _section("Results", "Not compared."), True
    table, same = [], True
    for method in dict.fromkeys([*one.rows, *two.rows]):
        scores = [side[method].get("accuracy") if method in side else None for side in (one.rows, two.rows)]
        a, b = scores
        same = same and method in one.rows and method in two.rows and a == b
        points = NONE if a is None or b is None else f"{100 * (b - a):+.2f}" if a != b else "0"
        table.append((method, *(NONE if score is None else f"{100 * score:.2f}" for score in scores), points))
    head = ("method", "A: accuracy (%)", "B: accuracy (%)", "difference (points)")
    return _section("Results", markdown(head, table) if table else "None."), same


def _costs(one: Found, two: Found) -> str:
    rows = []
    for method in dict.fromkeys([*(one.rows or {}), *(two.rows or {})]):
        old, new = ({key: value for key, value in (side.rows or {}).get(method, {}).items() if key not in NO_COSTS} for side in (one, two))
        rows += [(method, _plain(key), *_apart(old.get(key), new.get(key))) for key in old | new if old.get(key) != new.get(key)]
    for key in ("wall_seconds", "peak_memory_mb"):
        a, b = ((side.run or {}).get(key) for side in (one, two))
        rows += [("the run", _plain(key), *_apart(a, b))] if a != b else []
    return _section("Costs", markdown(("method", "cost", "A", "B"), rows, left=2) if rows else "The same.")


def _plain(key: str) -> str:
    return key.removesuffix("_mb").replace("_", " ") + (" (MiB)" if key.endswith("_mb") else "")


def _curves(one: Found, two: Found) -> tuple[str, bool]:
    if one.metrics is None or two.metrics is None:
        return _section("Curves", "Not compared."), True
    old, new = curves(one.metrics), curves(two.metrics)
    found = partings(old, new)
    if not found:
        return _section("Curves", f"All {len(old)} are the same."), True
    rows = [
        (f"{stage}: {name}" + (f" ({series})" if series else ""), words(place), *_apart(a, b))
        for (stage, series, name), place, a, b in found
    ]
    text = f"{len(found)} of {len(old | new)} part, the first at {words(found[0].place)}."
    return _section("Curves", f"{text}\n\n" + _cut(("curve", "parts at", "A", "B"), rows, left=2)), False


def _apart(a: object, b: object) -> tuple[str, str]:
    """Two values, with as many digits as tell them apart."""
    for digits in (4, 6, 10, 17):
        texts = [NONE if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in (a, b)]
        if texts[0] != texts[1]:
            break
    return texts[0], texts[1]
