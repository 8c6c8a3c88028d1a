"""TensorBoard and MLflow are told what the metrics say, and can neither change a run nor stop it."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedimpr.errors import FedimprError
from sim import tracking
from sim.config import Settings
from sim.flower import run_experiment
from sim.local import run_local
from sim.results import Status, read_metrics
from sim.tracking import Run, Scalar, Tracker, Tracking, scalars
from tests.sim.tiny import assert_same, tiny


@functools.lru_cache  # composing takes longer than running
def base(*more: str) -> Settings:
    return tiny(Path("unused"), *more, methods=["di"])


FEDAVG = ("strategy=fedavg", "rounds=2")  # the shortest run that can be resumed


def ran(folder: Path, trackers: Sequence[str] = (), *more: str, resume: bool = False) -> Path:
    run_local(replace(base(*more), output=str(folder), resume=str(folder) if resume else None, tracking=tuple(trackers)))
    return folder


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "EVERY", 0.02)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of MLflow's store in files, which is made faster than a database."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    yield mlflow.MlflowClient((tmp_path / "store").as_uri())


def expected(folder: Path, prefix: str = "") -> dict[str, list[tuple[int, float]]]:
    """The numbers of a folder's metrics by name, as pairs of step and value."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        for name, value, step, _ in scalars(line, 0.0):
            found.setdefault(name, []).append((step, value))
    return {name: sorted(pairs) for name, pairs in found.items()}


# --- names and steps ---


def test_a_line_of_a_round_stands_at_the_round() -> None:
    line = {"time": 1.0, "stage": "client", "round": 3, "client": 7, "loss": 0.5, "examples": 9}
    assert scalars(line, 8.0) == [Scalar("client/loss/client 7", 0.5, 3, 8.0), Scalar("client/examples/client 7", 9, 3, 8.0)]


def test_steps_are_counted_on_from_round_to_round() -> None:
    line = {"stage": "distilling di", "round": 3, "step": 20, "total": 100, "loss": 0.5}
    assert scalars(line, 8.0) == [Scalar("distilling di/loss", 0.5, 2 * 100 + 20, 8.0)]


def test_a_name_is_one_that_both_libraries_take() -> None:
    line = {"stage": "mining a+b", "round": 1, "step": 1, "total": 2, "loss (%)": 0.5}
    assert scalars(line, 0.0)[0].name == "mining a_b/loss ___"


# --- TensorBoard ---


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_tensorboard_has_every_number_the_pictures_and_the_settings(tmp_path: Path, real_pictures: None) -> None:
    folder = ran(tmp_path, ["tensorboard"], "rounds=2")
    found = events(folder)
    told = {tag: sorted((event.step, event.value) for event in found.Scalars(tag)) for tag in found.Tags()["scalars"]}
    wanted = expected(folder)
    assert told.keys() == wanted.keys() and "candidate/test_accuracy/FedAvg" in told and "mining di/loss" in told
    for tag, pairs in wanted.items():  # its numbers have 32 bits
        assert [step for step, _ in told[tag]] == [step for step, _ in pairs]
        assert [value for _, value in told[tag]] == pytest.approx([value for _, value in pairs], rel=1e-6, abs=1e-12)
    assert set(found.Tags()["images"]) == {"partition", "impressions"}
    (settings,) = found.Tensors("settings/text_summary")
    assert "| training.lr | 0.01 |" in settings.tensor_proto.string_val[0].decode()


def test_a_resumed_run_goes_on_in_the_same_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_after_a_round(tmp_path, ["tensorboard"], monkeypatch)
    ran(tmp_path, ["tensorboard"], *FEDAVG, resume=True)
    told = events(tmp_path).Scalars("candidate/test_accuracy/FedAvg")
    assert [event.step for event in told] == [1, 2]


def stopped_after_a_round(folder: Path, trackers: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sim.checkpoint import States

    def stops(self: States, round: int, *rest: Any) -> None:
        whole(self, round, *rest)
        raise KeyboardInterrupt

    whole = States.after_round
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(States, "after_round", stops)
        ran(folder, trackers, *FEDAVG)


# --- MLflow ---


def test_mlflow_has_every_number_the_settings_and_the_products(tmp_path: Path, store: Any) -> None:
    folder = ran(tmp_path / "run", ["mlflow"], "rounds=2")
    (run,) = store.search_runs([store.get_experiment_by_name("run").experiment_id])
    wanted = expected(folder)
    assert run.data.metrics.keys() == wanted.keys()
    for name, pairs in wanted.items():
        assert sorted((metric.step, metric.value) for metric in store.get_metric_history(run.info.run_id, name)) == pairs
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.tags["config_hash"] == base("rounds=2").hash()
    assert run.data.params["training.lr"] == "0.01" and run.data.params["rounds"] == "2" and run.data.params["dataset.shape"] == "[1, 8, 8]"
    assert {artifact.path for artifact in store.list_artifacts(run.info.run_id)} == {"report.html", "partition.png", "impressions.png"}


def test_mlflow_is_told_how_a_run_ended_and_a_resumed_one_is_the_same(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs() -> list[Any]:
        return list(store.search_runs([store.get_experiment_by_name("run").experiment_id]))

    stopped_after_a_round(tmp_path / "run", ["mlflow"], monkeypatch)
    (killed,) = runs()
    assert killed.info.status == "KILLED"
    ran(tmp_path / "run", ["mlflow"], *FEDAVG, resume=True)
    (whole,) = runs()
    assert whole.info.run_id == killed.info.run_id and whole.info.status == "FINISHED"
    steps = [metric.step for metric in store.get_metric_history(whole.info.run_id, "candidate/test_accuracy/FedAvg")]
    assert sorted(steps) == [1, 2]


def test_a_resumed_run_whose_store_is_gone_begins_another(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_after_a_round(tmp_path / "run", ["mlflow"], monkeypatch)
    (tmp_path / "store").rename(tmp_path / "moved")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "other").as_uri())
    ran(tmp_path / "run", ["mlflow"], *FEDAVG, resume=True)
    assert json.loads((tmp_path / "run" / "mlflow.json").read_text())["tracking_uri"] == (tmp_path / "other").as_uri()


def test_a_run_that_fails_is_a_failed_one(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*_: object, **__: object) -> None:
        raise FedimprError("no")

    monkeypatch.setattr("strategies.fedavg.Average.weights", stops)
    with pytest.raises(FedimprError):
        ran(tmp_path / "run", ["mlflow"], *FEDAVG)
    (run,) = store.search_runs([store.get_experiment_by_name("run").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, of SQLAlchemy
def test_without_an_address_mlflow_writes_a_database_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    here = tmp_path / "a folder"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ran(tmp_path / "run", ["mlflow"])
    assert sorted(path.name for path in here.iterdir()) == ["mlflow.db", "mlruns"]
    client = mlflow.MlflowClient(f"sqlite:///{here / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    assert run.data.metrics.keys() == expected(tmp_path / "run").keys()
    assert Path(run.info.artifact_uri.removeprefix("file://").replace("%20", " ")).is_relative_to(here / "mlruns")


def test_through_flower_the_current_folder_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's app has one of its own, which does not last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that it is as before after the test
    seen: list[str] = []
    monkeypatch.setattr("sim.flower.run", lambda *_, **__: seen.append(tracking.tracking_uri()) or 0)
    settings = replace(base("runtime=flower"), output=str(tmp_path / "run"), tracking=("mlflow",))
    run_experiment(settings, [])
    monkeypatch.chdir("/")
    assert seen == [f"sqlite:///{tmp_path / 'mlflow.db'}"] == [tracking.tracking_uri()]


# --- what goes wrong ---


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_library_is_one_line_before_anything_starts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find(wanted, *rest))
    with pytest.raises(FedimprError, match=rf"the library {name} is not installed\. Install it with: pip install 'fedimpr\[{name}\]'"):
        ran(tmp_path / "run", [name])
    assert not (tmp_path / "run").exists()


class Full:
    """Begins well, and can keep nothing."""

    def __init__(self, run: Run) -> None: ...

    def log(self, found: Sequence[Scalar]) -> None:
        raise OSError(28, "No space left\non device")

    def close(self, status: Status) -> None:
        raise AssertionError("it has failed")


def told_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sim.tracking"]


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "TRACKERS", {"mlflow": Full})
    monkeypatch.setattr(tracking, "check", lambda names: None)
    ran(tmp_path / "tracked", ["mlflow"], *FEDAVG)
    assert told_of(caplog) == ["tracking with mlflow has ended, and the run goes on without it: [Errno 28] No space left on device"]
    ran(tmp_path / "plain", (), *FEDAVG)
    assert_same(tmp_path / "tracked", tmp_path / "plain")


def test_tensorboard_that_cannot_be_written_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").touch()
    ran(tmp_path, ["tensorboard"], *FEDAVG)
    (line,) = told_of(caplog)
    assert line.startswith("tracking with tensorboard has ended") and str(tmp_path / "tensorboard") in line
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


def test_a_server_that_is_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ran(tmp_path, ["mlflow"], *FEDAVG)
    (line,) = told_of(caplog)
    assert line.startswith("tracking with mlflow has ended") and "127.0.0.1" in line and len(line) < 400


def stuck(release: threading.Event) -> type[Tracker]:
    class Stuck:
        def __init__(self, run: Run) -> None:
            release.wait()

        def log(self, found: Sequence[Scalar]) -> None: ...

        def close(self, status: Status) -> None: ...

    return Stuck


def test_a_tracker_that_never_answers_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    monkeypatch.setattr(tracking, "TRACKERS", {"mlflow": stuck(release)})
    monkeypatch.setattr(tracking, "WAIT", 0.1)
    told = Tracking(Run(settings=replace(base(), tracking=("mlflow",)), folder=tmp_path, resumed=False))
    told.start()
    start = time.perf_counter()
    for step in range(1000):
        told({"stage": "mining di", "round": 1, "step": step, "total": 1000, "loss": 0.5})
    assert time.perf_counter() - start < 0.1  # 0.1 ms a line
    told.finish("finished")
    assert told_of(caplog) == ["tracking with mlflow is still behind 0.1 s after the run, and is given up"]
    release.set()


def test_all_that_was_told_is_logged_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment at which the last line came."""
    kept: list[object] = []

    class Keeps:
        def __init__(self, run: Run) -> None: ...

        def log(self, found: Sequence[Scalar]) -> None:
            kept.extend(scalar.value for scalar in found)

        def close(self, status: Status) -> None:
            kept.append(status)

    monkeypatch.setattr(tracking, "TRACKERS", {"mlflow": Keeps})
    monkeypatch.setattr(tracking, "EVERY", 60.0)
    told = Tracking(Run(settings=replace(base(), tracking=("mlflow",)), folder=tmp_path, resumed=False))
    told.start()
    for step in range(5):
        told({"stage": "mining di", "round": 1, "step": step, "total": 5, "loss": float(step)})
    told.finish("interrupted")
    assert kept == [0, 1, 2, 3, 4, "interrupted"]
