"""Studies as a person runs them: in processes of their own, which fail, hang, are killed and go on."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedimpr.errors import ConfigError
from sim.config import composed
from sim.locks import locked
from sim.study.__main__ import command as study_command
from sim.study.__main__ import run as run_study
from sim.study.plan import checked, study_of
from sim.study.running import _available_mb, cores_of
from tests.sim.tiny import overrides

ROOT = Path(__file__).resolve().parents[2]
TROUBLE = "tests.sim.troubled_training"


def arguments(folder: Path, *more: str) -> list[str]:
    """A study of a few tiny runs of a second each."""
    tiny = overrides("runtime.threads=1", "evaluate_clients=false", methods=["di"])
    return ["study=demo", "~experiment", *tiny, f"study.output='{folder}'", *(more or ("partition.alpha=0.1,1.0", "seed=0,1"))]


def start(*typed: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sim.study", *typed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*typed: str) -> tuple[int, str, str]:
    process = start(*typed)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def rows(folder: Path) -> list[dict[str, Any]]:
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, out, err = run(*arguments(folder))
    assert status == 0 and "Traceback" not in err and "4 of 4 runs finished" in out
    return folder


@pytest.mark.slow
def test_every_run_and_method_is_a_row(undisturbed: Path) -> None:
    methods = ["one-shot FedAvg", "uniform ensemble", "student by DI"]
    found = rows(undisturbed)
    wanted = [(alpha, seed, method) for alpha in ("0.1", "1.0") for seed in "01" for method in methods]
    assert [(row["partition.alpha"], row["seed"], row["method"]) for row in found] == wanted
    for row in found:
        folder = undisturbed / "points" / row["point"]
        (told,) = [line for line in json.loads((folder / "summary.json").read_text()) if line["method"] == row["method"]]
        assert row["status"] == "finished" and float(row["accuracy"]) == told["accuracy"]
        assert row["config_hash"] == json.loads((folder / "run.json").read_text())["config_hash"]


@pytest.mark.slow
def test_the_command_of_a_row_makes_the_row_again(undisturbed: Path, tmp_path: Path) -> None:
    import shlex

    row = rows(undisturbed)[-1]
    typed = [*shlex.split(row["command"])[1:], f"output='{tmp_path / 'alone'}'"]
    subprocess.run([sys.executable, *typed], cwd=ROOT, check=True, capture_output=True)
    told = json.loads((tmp_path / "alone" / "summary.json").read_text())[-1]
    assert told["method"] == row["method"] and told["accuracy"] == float(row["accuracy"])


@pytest.mark.slow
def test_what_has_finished_is_not_run_again(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("points/*/run.json")}
    status, out, _ = run(*arguments(undisturbed))
    assert status == 0 and "4 runs, 0 to do" in out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("points/*/run.json")} == before


@pytest.mark.slow
def test_killed_ten_times_equals_not_killed(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL to the study alone, at moments drawn at random: its runs go with it, and resume."""
    moments, random_moments = 0, random.Random(0)
    while moments < 10:
        process = start(*arguments(tmp_path))
        wait_for((tmp_path / "study.json").exists)
        time.sleep(random_moments.uniform(0.0, 8.0 if moments % 2 else 4.5))
        if process.poll() is None:
            process.kill()
        process.communicate()
        moments += 1
    assert run(*arguments(tmp_path))[0] == 0
    assert (tmp_path / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(_available_mb() < 6000, reason="needs 6 GB of free memory")
def test_a_run_that_fails_hangs_dies_or_takes_memory_takes_no_other_with_it(tmp_path: Path) -> None:
    troubles = ["Raises", "Hangs", "Dies", "TakesMemory"]
    axis = ",".join(["fedimpr.training.LocalTraining", *(f"{TROUBLE}.{name}" for name in troubles)])
    typed = arguments(tmp_path, f"training._target_={axis}", "partition.alpha=1", "seed=0")
    limits = ("study.minutes=0.3", "study.memory_mb=1500")
    status, out, err = run(*typed, *limits)
    assert status == 1 and "1 of 5 runs finished" in out and "Traceback" not in err
    found = {row["training._target_"].rpartition(".")[2]: row for row in rows(tmp_path)}
    assert found["LocalTraining"]["status"] == "finished"
    assert all(found[name]["status"] == "failed" and not found[name]["method"] for name in troubles)
    assert "client 0, round 1, local training: the client failed: ValueError: out of coffee" in found["Raises"]["cause"]
    assert found["Hangs"]["cause"] == "it took longer than study.minutes = 0.3"
    assert found["Dies"]["cause"] == "its process was ended by SIGKILL; most likely memory ran out"
    assert "MiB, more than study.memory_mb = 1500" in found["TakesMemory"]["cause"]
    told = (tmp_path / "results.csv").read_bytes()
    status, out, _ = run(*typed, *limits)
    assert status == 1 and "5 runs, 0 to do" in out and "4 of them failed before and stay so; study.retry=true" in out
    assert (tmp_path / "results.csv").read_bytes() == told


@pytest.mark.slow
def test_ctrl_c_ends_all_runs_and_leaves_them_to_be_resumed(undisturbed: Path, tmp_path: Path) -> None:
    process = start(*arguments(tmp_path))
    wait_for(lambda: any(tmp_path.glob("points/*/run.json")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and (tmp_path / "results.csv").exists()
    assert run(*arguments(tmp_path))[0] == 0
    assert (tmp_path / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()


@pytest.mark.slow
def test_a_dry_run_tells_the_commands_and_the_time_and_writes_nothing(tmp_path: Path) -> None:
    status, out, _ = run(*arguments(tmp_path / "none"), "--dry-run")
    lines = out.splitlines()
    assert status == 0 and sum(line.split()[0] == "waiting" for line in lines) == 4 and "python -m sim 'synthesis=[di]'" in lines[0]
    assert "4 runs, 4 to do" in out and "a run: about" in out and "the study: about" in out
    assert not (tmp_path / "none").exists()


def test_two_studies_never_work_in_one_folder(tmp_path: Path) -> None:
    study = study_of(arguments(tmp_path))
    expected = pytest.raises(ConfigError, match="'study.output'.*no other study is at work in")
    with locked(tmp_path / "lock", "study.output", tmp_path, "study"), expected:
        run_study(study, checked(study), list(study.points()), "")


def test_help_names_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert study_command(["--help"]) == 0 and "studies: demo" in capsys.readouterr().out


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


CLUSTER = """
import sys
from sim.environment import quiet
quiet()
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_gives_the_same_results(undisturbed: Path, tmp_path: Path) -> None:
    """With one run whose process dies: it is a row, and the others finish."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], cwd=ROOT, text=True, **pipes) as cluster:
        try:
            address = next(line.split()[1] for line in cluster.stdout if line.startswith("address"))
            status, out, err = run(*arguments(tmp_path / "same"), f"study.address='{address}'")
            assert status == 0 and "Traceback" not in err, err
            assert (tmp_path / "same" / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()
            axis = f"training._target_=fedimpr.training.LocalTraining,{TROUBLE}.Dies"
            status, out, err = run(*arguments(tmp_path / "one", axis, "partition.alpha=1", "seed=0"), f"study.address='{address}'")
            assert status == 1 and "1 of 2 runs finished" in out
            assert rows(tmp_path / "one")[-1]["cause"] == "its process was ended by SIGKILL; most likely memory ran out"
        finally:
            cluster.communicate(timeout=60)


def test_a_run_takes_the_cores_of_all_its_workers() -> None:
    def cores(*asked: str) -> float:
        return cores_of(composed(list(asked)), 16.0)

    assert cores("runtime.threads=3") == cores("runtime.threads=1", "client_threads=3") == 3.0
    assert cores("runtime=ray", "runtime.workers=2") == 2.0
    mixed = ("runtime=ray", "runtime.workers=2", "runtime.gpus_per_worker=0.5", "runtime.cpus_per_worker=1.5")
    assert cores(*mixed, "runtime.cpu_workers=3") == (2 + 3) * 1.5
    assert cores(*mixed, "runtime.cpu_workers=null") == cores("runtime=ray") == 16.0
