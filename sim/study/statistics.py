"""From results to a table: mean, deviation and paired differences for every setting and method."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scipy.special import stdtrit

from sim.results import replace_file
from sim.study.content import FINISHED, Content, Result
from sim.study.reading import read_study

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Entry:
    """What the seeds of one setting say of one method. Accuracies and their differences are in [0, 1] and [-1, 1].

    Attributes:
        setting: the values of the axes.
        method: its name.
        n: finished runs that have it, one a seed.
        missing: seeds of this setting that have no finished run with it.
        mean: of the accuracies.
        deviation: their standard deviation (n - 1); ``None`` for one seed.
        ratio: the mean of accuracy over the ensemble's; ``None`` where it is unknown.
        difference: the mean of accuracy minus the baseline's, by seed; ``None`` without pairs.
        low, high: the 95 % confidence interval of that difference; ``None`` for fewer than two pairs.
        pairs: seeds that have both.
        unpaired: seeds that have one of the two only; ``None`` where the method is the baseline or the setting has none.
    """

    setting: tuple[str, ...]
    method: str
    n: int
    missing: int
    mean: float
    deviation: float | None
    ratio: float | None
    difference: float | None
    low: float | None
    high: float | None
    pairs: int
    unpaired: int | None


def entries(content: Content) -> list[Entry]:
    """An entry for every setting and method that a finished run has, settings in the order of ``results.csv``, methods in theirs."""
    found: dict[tuple[tuple[str, ...], str], dict[str, Result]] = {}
    for result in content.finished:
        found.setdefault((result.setting, result.method), {})[result.seed] = result
    seeds: dict[tuple[str, ...], set[str]] = {}
    for result in content.results:
        seeds.setdefault(result.setting, set(content.study.seeds)).add(result.seed)
    baseline = content.study.baseline
    return [
        _entry(mine, found.get((setting, baseline)) if baseline and method != baseline else None, len(seeds[setting]))
        for setting in content.settings
        for method in content.methods
        if (mine := found.get((setting, method)))
    ]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The confidence interval of their mean by Student's t; they are two or more."""
    n = len(differences)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(differences) / math.sqrt(n)
    return fmean(differences) - half, fmean(differences) + half


def remarks(content: Content, table: Sequence[Entry]) -> list[str]:
    """What one has to know to read the table, one sentence each."""
    said = []
    status = Counter({point: lines[0].status for point, lines in content.runs.items()}.values())
    if rest := ", ".join(f"{count:,} {name or 'of unknown status'}" for name, count in status.items() if name != FINISHED):
        said.append(f"Runs that are not finished do not count: {rest}.")
    single = sum(entry.n == 1 for entry in table)
    if single:
        said.append(f"{_lines(single, len(table))} one seed only, so no deviation and no interval.")
    if missing := sum(entry.missing > 0 for entry in table):
        said.append(f"{_lines(missing, len(table))} fewer seeds than the study has.")
    baseline = content.study.baseline
    if baseline and (alone := sum(entry.unpaired or 0 for entry in table)):
        results = "1 result has" if alone == 1 else f"{alone:,} results have"
        said.append(f"{results} no partner of the same seed and setting, and stay out of the differences.")
    if baseline:
        having = {entry.setting for entry in table if entry.pairs or entry.method == baseline}
        if without := len({entry.setting for entry in table} - having):
            said.append(
                f"{without:,} of {len({entry.setting for entry in table}):,} settings have no result of the baseline, so no differences."
            )
    return said


def explained(content: Content, table: Sequence[Entry]) -> str:
    """What the columns mean."""
    text = "Accuracy in %: mean over n seeds, and their standard deviation (n − 1)."
    if any(entry.pairs for entry in table):
        text += (
            f" The difference is from {content.study.baseline}, in points, paired by seed in the same setting; its "
            f"{100 * CONFIDENCE:g} % confidence interval over seeds is Student's t."
        )
    return text


def write_tables(folder: Path) -> list[Path]:
    """Write ``table.csv`` (fractions, for programs) and ``table.md`` (per cent, for papers and issues) from what the folder holds.

    Raises:
        FedimprError: a file cannot be written.
    """
    content = read_study(folder)
    table = entries(content)
    paths = [folder / "table.csv", folder / "table.md"]
    for path, text in zip(paths, (_csv(content, table), _markdown(content, table)), strict=True):
        replace_file(path, text.encode(errors="replace"))
    return paths


def _entry(mine: Mapping[str, Result], base: Mapping[str, Result] | None, asked: int) -> Entry:
    first, accuracies = next(iter(mine.values())), [_accuracy(result) for result in mine.values()]
    ratios = [ratio for result in mine.values() if (ratio := result.number("ratio")) is not None]
    differences = [_accuracy(result) - _accuracy(base[seed]) for seed, result in mine.items() if base and seed in base]
    low, high = interval(differences) if len(differences) > 1 else (None, None)
    return Entry(
        setting=first.setting,
        method=first.method,
        n=len(accuracies),
        missing=asked - len(accuracies),
        mean=fmean(accuracies),
        deviation=stdev(accuracies) if len(accuracies) > 1 else None,
        ratio=fmean(ratios) if ratios else None,
        difference=fmean(differences) if differences else None,
        low=low,
        high=high,
        pairs=len(differences),
        unpaired=None if base is None else len(mine.keys() ^ base.keys()),
    )


def _accuracy(result: Result) -> float:
    assert result.accuracy is not None  # Content.finished
    return result.accuracy


def _lines(count: int, total: int) -> str:
    return f"{count:,} of {total:,} lines {'rests' if count == 1 else 'rest'} on"


NUMBERS = ("n", "missing", "mean", "deviation", "ratio", "difference", "low", "high", "pairs", "unpaired")


def _csv(content: Content, table: Sequence[Entry]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*content.axes, "method", *NUMBERS])
    for entry in table:
        values = [getattr(entry, name) for name in NUMBERS]
        cells = ["" if value is None else f"{value:.6f}" if isinstance(value, float) else value for value in values]
        writer.writerow([*entry.setting, entry.method, *cells])
    return out.getvalue()


def _markdown(content: Content, table: Sequence[Entry]) -> str:
    study, paired = content.study, any(entry.pairs for entry in table)
    head = [*content.axes, "method", "accuracy (%)", "n"] + (["difference (points)", "95 % interval", "pairs"] if paired else [])
    lines = []
    for entry in table:
        spread = "" if entry.deviation is None else f" ({100 * entry.deviation:.2f})"
        cells = [*entry.setting, entry.method, f"{100 * entry.mean:.2f}{spread}", str(entry.n)]
        if paired:
            inside = "–" if entry.low is None or entry.high is None else f"{100 * entry.low:+.2f} to {100 * entry.high:+.2f}"
            cells += [
                "–" if entry.difference is None else f"{100 * entry.difference:+.2f}",
                inside,
                str(entry.pairs) if entry.pairs else "–",
            ]
        lines.append(cells)
    rule = ["---"] * (len(content.axes) + 1) + ["---:"] * (len(head) - len(content.axes) - 1)
    body = "\n".join("| " + " | ".join(map(_cell, cells)) + " |" for cells in (head, rule, *lines))
    said = [explained(content, table), *remarks(content, table), *(f"Damaged: {notice}" for notice in content.notices)]
    parts = [f"# {_line(study.name)}", _line(study.question), body, "\n".join(f"- {_line(text)}" for text in said)]
    parts += [f"`{_line(study.command)}`"] if study.command else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|") or "–"


def _line(text: str) -> str:
    return " ".join(text.split())
