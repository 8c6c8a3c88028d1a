"""A run that was stopped at any moment goes on to the weights, the table and the metrics of one that was not."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor

from fedimpr.errors import ConfigError, FedimprError, UpdateError
from fedimpr.update import Update
from sim import client_app, server_app
from sim.checkpoint import States
from sim.config import Settings, composed
from sim.grid import LocalGrid
from sim.local import run_local
from sim.results import read_metrics
from strategies.keep import Received
from tests.makers import needs_a_compiler
from tests.sim.power import Stopped, stopping
from tests.sim.tiny import overrides, tiny

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["cmi_warm", "di"]  # one with a memory and images before the first step, one without
MODEL = "model.options.batch_norm=true"  # what the memory is of
# Of a round: the updates; cmi_warm: images before, two portions, four steps and the end; di: all but images before; the round.
SAVINGS = 1 + (1 + 2 + 4 + 1) + (2 + 4 + 1) + 1


@functools.lru_cache  # composing takes longer than running
def base(*more: str) -> Settings:
    return tiny(Path("unused"), "rounds=2", "save_seconds=0", MODEL, *more, methods=METHODS)


def small(folder: Path, *more: str, resume: Path | None = None) -> Settings:
    """Two rounds, saved at every safe point."""
    return replace(base(*more), output=str(folder), resume=None if resume is None else str(resume))


def resumed(folder: Path, *more: str) -> Settings:
    return small(folder, *more, resume=folder)


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every product, and of the state after the last round."""
    files = [*sorted(folder.glob("*.safetensors")), sorted(folder.glob("state/round-*.safetensors"))[-1]]
    return {f"{path.name}/{key}": tensor for path in files for key, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


TIMES = {"time", "seconds", "mining_seconds", "peak_memory_mb"}


def told(folder: Path) -> tuple[list[dict], list[dict]]:
    """What the metrics say of rounds but not of the steps inside, and the table, without times and memory."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "round" in line and "step" not in line]
    rows = json.loads((folder / "summary.json").read_text())
    return tuple([{key: value for key, value in line.items() if key not in TIMES} for line in part] for part in (lines, rows))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run_local(small(folder))
    return folder


def stop_and_go_on(folder: Path, savings: int, straight: Path) -> None:
    with stopping(savings), pytest.raises(Stopped):
        run_local(small(folder))
    run_local(resumed(folder))
    assert same(weights(folder), weights(straight)), f"stopped after saving {savings}"
    assert told(folder) == told(straight)
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["lock", "round-00001.safetensors", "round-00002.safetensors"]


# cmi_warm's second step; di's first portion; and half way through the second round. The others are among the slow tests.
@pytest.mark.parametrize("savings", [5, 10, SAVINGS + 6])
def test_stopped_in_a_server_stage_it_goes_on_to_the_same_weights_and_tells_nothing_twice(
    tmp_path: Path, straight: Path, savings: int
) -> None:
    stop_and_go_on(tmp_path, savings, straight)


@pytest.mark.slow
@pytest.mark.parametrize("savings", range(1, 2 * SAVINGS))
def test_whatever_was_saved_last_it_goes_on_to_the_same_weights(tmp_path: Path, straight: Path, savings: int) -> None:
    stop_and_go_on(tmp_path, savings, straight)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("savings", [5, 12])
def test_compiled_it_goes_on_to_the_same_weights(tmp_path: Path, savings: int) -> None:
    """In the middle of the first method's student and of the second's, by a process that has compiled nothing yet."""
    run_local(small(tmp_path / "straight", "compile=true"))
    torch._dynamo.reset()
    with stopping(savings), pytest.raises(Stopped):
        run_local(small(tmp_path / "stopped", "compile=true"))
    torch._dynamo.reset()
    run_local(small(tmp_path / "stopped", "compile=true", resume=tmp_path / "stopped"))
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "straight"))


@pytest.mark.slow
def test_there_are_as_many_savings_as_are_counted_here(tmp_path: Path) -> None:
    with stopping(2 * SAVINGS + 1):
        run_local(small(tmp_path))
    with stopping(2 * SAVINGS), pytest.raises(Stopped):
        run_local(small(tmp_path))


def test_a_run_that_was_stopped_after_its_last_round_still_gets_its_report(tmp_path: Path, straight: Path) -> None:
    with stopping(2 * SAVINGS), pytest.raises(Stopped):
        run_local(small(tmp_path))
    (tmp_path / "report.html").unlink()
    run_local(resumed(tmp_path))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished" and (tmp_path / "report.html").exists()
    assert same(weights(tmp_path), weights(straight)) and told(tmp_path) == told(straight)


def test_it_may_go_on_in_another_folder_and_be_stopped_there_too(tmp_path: Path, straight: Path) -> None:
    """The second folder has all it needs, and the first stays as it is."""
    one, two = tmp_path / "one", tmp_path / "two"
    with stopping(SAVINGS + 5), pytest.raises(Stopped):
        run_local(small(one))
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    with stopping(3), pytest.raises(Stopped):
        run_local(small(two, resume=one))
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before
    run_local(resumed(two))
    assert same(
        {key: tensor for key, tensor in weights(two).items() if "one-shot" not in key},
        {key: tensor for key, tensor in weights(straight).items() if "one-shot" not in key},  # of round 1, which the first folder has
    )


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("part", ["updates", "student-by-cmi_warm", "student-by-di"])
def test_a_damaged_part_costs_time_and_nothing_else(tmp_path: Path, straight: Path, part: str) -> None:
    with stopping(12), pytest.raises(Stopped):  # in di
        run_local(small(tmp_path))
    damaged(tmp_path / f"state/round-00001/{part}.safetensors")
    run_local(resumed(tmp_path))
    assert same(weights(tmp_path), weights(straight)) and told(tmp_path) == told(straight)


# --- clients ---


def clients(turns: list[int], failing: int | None = None) -> ClientApp:
    """The client app, with a diary; one partition may fail."""
    app = ClientApp()
    app.query()(client_app.who)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        turns.append(int(context.node_config["partition-id"]))
        if turns[-1] == failing:
            raise OSError("the disk is full")
        return client_app.train(message, context)

    return app


def run_with(app: ClientApp, settings: Settings) -> None:
    server_app.run(settings, LocalGrid(app, settings.clients, {}))


def test_clients_that_have_answered_are_not_asked_again(tmp_path: Path) -> None:
    turns: list[int] = []
    with stopping(1), pytest.raises(Stopped):
        run_with(clients(turns), small(tmp_path))
    run_with(clients(turns), resumed(tmp_path))
    assert turns == [0, 1, 2, 0, 1, 2]  # once a round


def test_clients_that_had_not_all_answered_are_asked_again(tmp_path: Path, straight: Path) -> None:
    def stops(message: Message, context: Context) -> Message:
        raise Stopped

    app = ClientApp()
    app.query()(client_app.who)
    app.train()(stops)
    with pytest.raises(Stopped):
        run_with(app, small(tmp_path))
    run_local(resumed(tmp_path))
    assert same(weights(tmp_path), weights(straight)) and told(tmp_path) == told(straight)


def test_who_was_left_out_stays_left_out_and_is_named_once(tmp_path: Path) -> None:
    """Client 1 fails in either round, before and after the run is stopped in the second."""
    for folder, savings in (("straight", None), ("stopped", SAVINGS + 4)):
        settings = small(tmp_path / folder, "strategy.minimum_updates=2")
        if savings is not None:
            with stopping(savings), pytest.raises(Stopped):
                run_with(clients([], failing=1), settings)
            settings = resumed(tmp_path / folder, "strategy.minimum_updates=2")
        run_with(clients([], failing=1), settings)
    assert told(tmp_path / "stopped") == told(tmp_path / "straight")
    reasons = [json.loads((tmp_path / folder / "run.json").read_text())["excluded"] for folder in ("straight", "stopped")]
    assert reasons[0] == reasons[1] and [reason[:17] for reason in reasons[0]] == ["client 1, round 1", "client 1, round 2"]


def test_what_clients_answered_survives_the_disk(tmp_path: Path) -> None:
    weights = {"network.0.weight": torch.randn(2, 3), "steps": torch.tensor(7)}
    updates = [Update(0, 4, weights, 11, {"loss": 0.1}, torch.tensor([5, 6])), Update(2, 4, weights, 3, {"loss": float("nan")})]
    errors = [
        UpdateError("tensor 'w' must be (2,)", client=1, round=4, stage="checking", value=((1,), "x"), remedy="Compare their config."),
        UpdateError("no reply", client=3, round=4),
    ]
    states = States(tmp_path, 0.0)
    states.save(4, "updates", Received(updates, errors, 1.5, {0: 24, 3: 8}).state_dict())
    got = Received.from_state_dict(states.load(4, "updates"))
    assert got.seconds == 1.5 and [str(error) for error in got.excluded] == [str(error) for error in errors]
    assert [(error.client, error.round) for error in got.excluded] == [(1, 4), (3, 4)]
    for sent, back in zip(updates, got.updates, strict=True):
        assert (back.partition, back.round, back.examples, str(back.metrics)) == (sent.partition, 4, sent.examples, str(sent.metrics))
        assert same(back.weights, sent.weights) and (back.label_counts is None) == (sent.label_counts is None)
    assert torch.equal(got.updates[0].label_counts, torch.tensor([5, 6]))


# --- a full disk ---


def test_a_full_disk_stops_the_run_in_one_line_and_costs_nothing_that_was_saved(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fifth saving on nothing can be written, not even how the run ended."""
    full, moved = [0], os.replace

    def counting(partial, path) -> None:
        full[0] += str(path).endswith(".safetensors") and "state" in str(path)
        if full[0] >= 5:
            raise OSError(28, "No space left on device")
        moved(partial, path)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", counting)
        expected = r"^round 1, saving the state \(student by cmi_warm\): cannot write .*No space left on device\. Free some space.*resume="
        with pytest.raises(FedimprError, match=expected):
            run_local(small(tmp_path))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
    run_local(resumed(tmp_path))
    assert same(weights(tmp_path), weights(straight)) and told(tmp_path) == told(straight)


# --- processes ---


def longer(folder: Path, *more: str) -> list[str]:
    """One round that takes some seconds, as a command line."""
    steps = {"synthesis.cmi_warm.synthesizer.steps": 20, "synthesis.di.synthesizer.steps": 50, "distillation.steps": 100}
    return overrides(f"output='{folder}'", MODEL, *(f"{key}={value}" for key, value in steps.items()), *more, methods=METHODS)


def started(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sim", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read() if process.poll() is not None else "too slow"
        time.sleep(0.002)


def at(folder: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether the metrics have been told of a step of a stage since now."""
    path = folder / "metrics.jsonl"
    before = path.read_bytes().count(b'"stage"') if path.exists() else 0

    def reached() -> bool:
        lines = path.read_text().splitlines()[before:-1] if path.exists() else []
        return any(line["stage"] == stage and line.get("step", 0) >= step for line in map(json.loads, lines))

    return reached


def kill(folder: Path, stage: str, step: int, *more: str) -> None:
    process, there = started(*longer(folder, "save_seconds=0", *more)), at(folder, stage, step)
    until(there, process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def long_straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    run_local(settings_of(folder))
    return folder


def settings_of(folder: Path, *more: str) -> Settings:
    return composed(longer(folder, *more))


@pytest.mark.slow
def test_a_killed_process_goes_on_and_nobody_interferes_while_it_lives(tmp_path: Path, long_straight: Path) -> None:
    process = started(*longer(tmp_path, "save_seconds=0"))
    until(at(tmp_path, "distilling cmi_warm", 30), process)
    for more, key in (((), "output"), ((f"resume='{tmp_path}'",), "resume")):
        with pytest.raises(ConfigError, match=f"'{key}' is .*; allowed: a folder that no other run is at work in"):
            run_local(settings_of(tmp_path, *more))
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    run_local(settings_of(tmp_path, f"resume='{tmp_path}'"))
    assert same(weights(tmp_path), weights(long_straight)) and told(tmp_path) == told(long_straight)
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["stage"] == "distilling cmi_warm"]
    assert set(steps) == set(range(1, 101)) and len(steps) <= 101  # one step at most was made twice: the one that was not yet saved


@pytest.mark.slow
def test_killed_at_many_moments_one_after_another_it_ends_in_the_same_weights(tmp_path: Path, long_straight: Path) -> None:
    resume = ()
    # In the steps that the two stages of a method tell, half of them before the student's second portion.
    for stage, step in (
        ("training clients", 1),
        ("mining cmi_warm", 1),
        ("mining cmi_warm", 30),
        ("distilling cmi_warm", 1),
        ("distilling cmi_warm", 40),
        ("mining cmi_warm", 50),
        ("distilling cmi_warm", 80),
        ("mining di", 50),
        ("distilling di", 20),
        ("mining di", 150),
        ("distilling di", 90),
    ):
        kill(tmp_path, stage, step, *resume)
        resume = (f"resume='{tmp_path}'",)
    run_local(settings_of(tmp_path, *resume))
    assert same(weights(tmp_path), weights(long_straight)) and told(tmp_path) == told(long_straight)
