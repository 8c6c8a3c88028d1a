"""Benchmarks that have a tiny run can still do it: a number counts as long as its command runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sim.config import composed, construct

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    "command",
    [
        "adaptation.py mnist_digits --targets digits --validation",
        "adaptation.py pacs_adaptation --targets photo --validation",
        "harmful_source.py mnist_shifts --validation",
        "clients.py",
        "ensemble.py",
        "first_round.py",
        "memory.py",
        "methods.py mnist --methods di cmi dfq",
        "nearer_start.py",
        "runners.py",
        "synthesis_speed.py",
        "target_mismatch.py mnist",
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


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    return methods


def test_a_run_of_other_settings_is_not_done(methods: Any) -> None:
    pair = methods.PAIRS["mnist"]
    row = {"method": "di", "settings": methods.fingerprint(pair, "di", False)}
    learning = dataclasses.replace(pair.budget.learning, lr=pair.budget.learning.lr / 2)
    slower = dataclasses.replace(pair, budget=dataclasses.replace(pair.budget, learning=learning))
    assert methods.current(row, pair, False)
    assert not methods.current(row, slower, False)
    assert not methods.current({**row, "method": "ci"}, pair, False), "another method's settings"
    assert not methods.current({**row, "method": "renamed since"}, pair, False)


def test_a_table_never_averages_runs_of_different_settings(methods: Any, tmp_path: Path) -> None:
    pair, same = methods.PAIRS["mnist"], {"teacher": 0.99, "mining_seconds": 1, "distilling_seconds": 1, "images": 1, "mining_passes": 1}
    now = {name: methods.fingerprint(pair, name, False) for name in pair.runs}
    rows = [("di", 0, "", 0.5), ("di", 1, "", 0.7), ("ci", 0, "", 0.6), ("di", 1, now["di"], 0.9)]
    written = [{"method": m, "seed": s, "settings": k, "accuracy": a, "measures": {}, **same} for m, s, k, a in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in written))
    held = methods.last(methods.lines(file))
    assert [row["accuracy"] for row in held] == [0.5, 0.9, 0.6], "the last run of a method and seed"
    text = methods.table(pair, held, tiny=False)
    assert "| di | 90.00 | 90.00 |" in text
    assert "| ci (earlier settings) | 60.00 | 60.00 |" in text


@pytest.mark.parametrize(("method", "yaml", "objective"), [("di, long", "digits", "l1"), ("nayer, Muon", "strokes", "mse")])
def test_the_yaml_of_a_row_says_how_its_student_learns(methods: Any, method: str, yaml: str, objective: str) -> None:
    settings = composed(["dataset=mnist", f"distillation={yaml}", f"objective={objective}"])
    assert construct(settings.distillation, "distillation") == methods.PAIRS["mnist"].runs[method](tiny=False).distillation
