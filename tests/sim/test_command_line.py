"""The command line as a person meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sim.tiny import overrides

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sim", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_wrong_input_is_one_line_and_status_1(tmp_path: Path) -> None:
    for arguments, expected in ((["clinets=3"], "did you mean clients"), (["partition.alpha=0"], "'partition.alpha' is 0")):
        ended = run(*arguments, f"output={tmp_path / 'out'}")
        assert ended.returncode == 1 and ended.stdout == ""
        (line,) = ended.stderr.splitlines()
        assert line.startswith("error: ") and expected in line
    assert not (tmp_path / "out").exists()


def test_what_a_client_raises_comes_with_its_traceback_where_one_debugs(tmp_path: Path) -> None:
    """And the lines behind it say which client it was, and when."""
    asked = overrides("training._target_=tests.sim.troubled_training.Raises", "strategy=fedavg", f"output='{tmp_path}'")
    ended = run(*asked, "runtime.debug=true")
    *_, error, client, far = ended.stderr.splitlines()
    assert ended.returncode == 1 and "troubled_training.py" in ended.stderr
    assert (error, client) == ("ValueError: out of coffee", "client 0, round 1, local training") and far.startswith("round 1 of 1")


@pytest.mark.slow
def test_a_sweep_runs_every_point_and_one_bad_point_costs_only_itself(tmp_path: Path) -> None:
    points = overrides("seed=0,-1,1", f"output='{tmp_path}/${{seed}}'", f"hydra.sweep.dir='{tmp_path}/sweep'", methods=["di"])
    ended = run("-m", *points)
    assert ended.returncode == 1 and "'seed' is -1; allowed: an integer >= 0" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "sweep"]
    assert all(json.loads((tmp_path / seed / "run.json").read_text())["status"] == "finished" for seed in ("0", "1"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_a_readable_folder(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Stopped in the middle of mining: what was finished is in the table, and the report shows it."""
    endless = overrides("synthesis.di.synthesizer.steps=1000000", f"output='{tmp_path}'", methods=["di"])
    process = subprocess.Popen(command(*endless), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 60
    summary = tmp_path / "summary.json"
    while not (summary.exists() and len(json.loads(summary.read_text())) == 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    assert [row["method"] for row in json.loads(summary.read_text())] == ["mean client", "one-shot FedAvg", "uniform ensemble"]
    assert "uniform ensemble" in out and str(tmp_path) in out
    assert "interrupted" in (tmp_path / "report.html").read_text() and (tmp_path / "partition.png").exists()


def test_telemetry_is_off_unless_the_user_says_otherwise() -> None:
    code = "import sim.__main__, os; print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    clean = {key: value for key, value in os.environ.items() if key not in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")}
    for given, expected in (({}, "0 0"), ({"FLWR_TELEMETRY_ENABLED": "1"}, "1 0")):
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**clean, **given}, check=True)
        assert ended.stdout.strip() == expected


def test_help_comes_at_once(tmp_path: Path) -> None:
    ended = run("--help")
    assert ended.returncode == 0 and "experiment" in ended.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_run_through_flower_leaves_one_too(tmp_path: Path) -> None:
    """There the server is killed with its SuperLink; the command closes the record for it."""
    endless = overrides("synthesis.di.synthesizer.steps=1000000", f"output='{tmp_path}'", "runtime=flower", methods=["di"])
    process = subprocess.Popen(command(*endless), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline, summary = time.monotonic() + 90, tmp_path / "summary.json"
    while not (summary.exists() and len(json.loads(summary.read_text())) == 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted" and len(json.loads(summary.read_text())) == 3
    assert "uniform ensemble" in (tmp_path / "report.html").read_text()
