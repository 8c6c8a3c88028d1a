"""The command that says what differs between two runs: ``python -m sim.compare RUN RUN``.

As ``diff`` does, it ends with status 0 where the results are the same, 1 where they differ, and 2 where something could not be compared.
Results are weights, the table's accuracies, and every number of the metrics that no clock measured. When a run started, how long it took
and in which order it wrote are none.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sim.environment import quiet

SAME, DIFFERENT, TROUBLE = 0, 1, 2


def compare(one: Path, two: Path) -> tuple[str, list[str], int]:
    """What differs between two result folders.

    Returns:
        the text, one line for each file that could not be compared, and the exit status.

    Raises:
        FedimprError: one of them is no result folder.
    """
    from sim.differences import described  # PyTorch takes seconds to import: --help must not wait for it
    from sim.folders import read_run

    a, b = read_run(one, "A"), read_run(two, "B")
    text, same = described(a, b)
    problems = [*a.problems, *b.problems]
    return text, problems, TROUBLE if problems else SAME if same else DIFFERENT


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sim.compare", description="Say what differs between two runs.")
    parser.add_argument("one", type=Path, metavar="RUN", help="the result folder of a run, A")
    parser.add_argument("two", type=Path, metavar="RUN", help="another, B")
    parser.epilog = "Exit status: 0 where the results are the same, 1 where they differ, 2 where something could not be compared."
    given = parser.parse_args(arguments)
    quiet()
    from fedimpr.errors import FedimprError

    try:
        text, problems, status = compare(given.one, given.two)
    except FedimprError as error:
        print(f"error: {error}", file=sys.stderr)
        return TROUBLE
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `head` has; what Python writes on leaving must not fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
