"""Benchmarks that have a tiny run can still do it: a number counts as long as its command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    "command",
    [
        "clients.py",
        "ensemble.py",
        "memory.py",
        "methods.py mnist --methods di cmi dfq",
        "runners.py",
        "synthesis_speed.py",
        "transfer_size.py",
    ],
)
def test_a_tiny_run_ends_well(command: str) -> None:
    results = ROOT / "benchmarks" / "results"
    before = {path: path.read_bytes() for path in results.glob("*.*")}
    file, *rest = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / file), *rest, "--tiny"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout and {path: path.read_bytes() for path in results.glob("*.*")} == before
