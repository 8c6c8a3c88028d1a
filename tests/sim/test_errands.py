"""The server's work, done by workers: as many pieces side by side as there are, and not a bit of a difference to the result."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedimpr.errors import ConfigError, FedimprError
from fedimpr.synthesis.contrastive import ContrastiveModelInversion
from fedimpr.synthesis.data_impressions import DataImpressions
from sim.config import call, composed
from sim.errands import Workers, run_errand
from sim.grid import LocalGrid
from sim.local import run_local
from sim.on_ray import Runtime, run_on_ray
from sim.results import read_metrics
from tests.sim.test_one_answer import NEEDS
from tests.sim.tiny import assert_same, tiny

METHODS = ["di", "cmi"]
ADAPTING = ("strategy=adapting", *NEEDS["adapting"], "rounds=3")


class Here:
    """Workers that are this very process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        monkeypatch.setattr(LocalGrid, "errands", self)

    def do_errands(self, errands: Sequence[tuple[Any, ...]], look: Callable[[], None]) -> list[str | None]:
        return [self.do(errand, look) for errand in errands]

    def do(self, errand: tuple[Any, ...], look: Callable[[], None]) -> str | None:
        try:
            run_errand(*errand)
            self.done.append(errand[-1])
            return None
        except FedimprError as error:
            return str(error)
        finally:
            look()


@pytest.mark.parametrize(
    ("case", "pieces"),
    [
        (("rounds=2",), ["student by di", "student by cmi"] * 2),
        (("rounds=1", "strategy.updates_in_memory_mb=0"), ["student by di", "student by cmi"]),
        (ADAPTING, ["impressions by di", "impressions by cmi"]),
    ],
    ids=["students", "models that are read from disk", "sources"],
)
def test_the_server_takes_over_what_the_workers_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, ...], pieces: list[str]
) -> None:
    run_local(tiny(tmp_path / "alone", *case, methods=METHODS))
    workers = Here(monkeypatch)
    run_local(tiny(tmp_path / "spread", *case, methods=METHODS))
    assert workers.done == pieces
    assert_same(tmp_path / "alone", tmp_path / "spread")


def test_curves_have_the_same_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_local(tiny(tmp_path / "alone", methods=METHODS))
    Here(monkeypatch)
    run_local(tiny(tmp_path / "spread", methods=METHODS))

    assert points(tmp_path / "alone") == points(tmp_path / "spread") != []


def points(folder: Path) -> list[tuple[str, int, float]]:
    """Those of all curves, by stage."""
    rows = read_metrics(folder / "metrics.jsonl")
    return sorted((row["stage"], row["step"], round(row["loss"], 5)) for row in rows if "loss" in row and "step" in row)


def test_what_no_worker_could_finish_is_left_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder is on the server's disk alone; once the worker is gone, the piece goes on from what it kept, or anew."""
    run_local(tiny(tmp_path / "alone", methods=METHODS))
    workers = Here(monkeypatch)
    elsewhere = str(tmp_path / "elsewhere")
    monkeypatch.setattr(workers, "do", lambda errand, look: Here.do(workers, (errand[0], elsewhere, *errand[2:]), look))
    with caplog.at_level(logging.WARNING, "sim.errands"):
        run_local(tiny(tmp_path / "spread", methods=METHODS))
    told = [record.getMessage() for record in caplog.records if record.name == "sim.errands"]
    assert len(told) == 2 and workers.done == []
    assert told[0].startswith("no worker finished 'student by di' (round 1, student by di: this node does not see the updates of the round")
    assert "runtime.server_work=here" in told[0]
    assert_same(tmp_path / "alone", tmp_path / "spread")


def test_a_worker_without_the_servers_gpu_does_not_try(tmp_path: Path) -> None:
    settings = tiny(tmp_path, "device=cpu", methods=METHODS)
    with pytest.raises(FedimprError, match="the server computes on cuda, and this worker on cpu. Set runtime.gpus_per_worker"):
        run_errand(settings.to_json(), str(tmp_path), "cuda", 1, "student by di")


def test_threads_of_the_server_need_room_on_the_workers() -> None:
    with pytest.raises(ConfigError, match="'runtime.threads' is 2; allowed: at most cpus_per_worker=1 with server_work=workers"):
        call(Runtime, {**composed(["runtime=ray"]).runtime, "threads": 2, "server_work": "workers"}, "runtime")


ON_RAY = ("runtime=ray", "runtime.workers=2", "runtime.server_work=workers")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestOnRay:
    @pytest.mark.parametrize("case", [(), ADAPTING], ids=["students", "sources"])
    def test_workers_do_it_and_the_server_does_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: tuple[str, ...]
    ) -> None:
        run_local(tiny(tmp_path / "local", *case, methods=METHODS))
        for method in (DataImpressions, ContrastiveModelInversion):
            monkeypatch.setattr(method, "synthesize", lambda *_, **__: pytest.fail("the server mines itself"))
        caplog.clear()
        run_on_ray(tiny(tmp_path / "ray", *case, *ON_RAY, methods=METHODS))
        assert_same(tmp_path / "local", tmp_path / "ray")
        assert "the batch_norm term (weight 1) is dropped: the teacher has no batch norm" in [one.getMessage() for one in caplog.records]

    def test_a_piece_outlives_its_worker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """One is killed as soon as a piece tells how far it is; another goes on with the piece."""
        long = ("distillation.steps=400", "save_seconds=0")
        run_local(tiny(tmp_path / "local", *long, methods=METHODS))
        tell, killed = Workers._tell, []

        def kills(self: Workers, path: Path, start: int) -> int:
            read = tell(self, path, start)
            if read and not killed:
                killed.append(victim())
                os.kill(killed[0], signal.SIGKILL)
            return read

        monkeypatch.setattr(Workers, "_tell", kills)
        with caplog.at_level(logging.WARNING):
            run_on_ray(tiny(tmp_path / "ray", *long, *ON_RAY, methods=METHODS))
        told = " ".join(record.getMessage() for record in caplog.records)
        assert killed and "a worker is lost and replaced" in told and "no worker finished" not in told
        assert_same(tmp_path / "local", tmp_path / "ray")
        assert points(tmp_path / "local") == points(tmp_path / "ray")


def victim() -> int:
    """The process of a worker that is at a piece."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::Worker.errand"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("no worker is at a piece")
