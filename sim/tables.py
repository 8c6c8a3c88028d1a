"""Tables in plain characters. They are Markdown, so they can be pasted into a note as they are."""

from __future__ import annotations

from collections.abc import Sequence

from sim.results import Row


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """A table with aligned columns: the first ``left`` to the left, the others to the right."""
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        " | ".join(cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def results(rows: Sequence[Row]) -> str:
    """The final table."""
    head = ("method", "accuracy (%)", "ratio to the ensemble", "seconds")
    ratios = ["-" if row.ratio is None else f"{row.ratio:.3f}" for row in rows]
    cells = [(row.method, f"{100 * row.accuracy:.2f}", ratio, f"{row.seconds:.1f}") for row, ratio in zip(rows, ratios, strict=True)]
    return markdown(head, cells)
