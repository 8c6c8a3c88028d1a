"""The files of a run's state: whole or not at all, few, and one process's own."""

from __future__ import annotations

import errno
import json
import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor

from fedimpr.errors import ConfigError, FedimprError
from sim import checkpoint
from sim.checkpoint import States, opened
from sim.config import Settings
from strategies.keep import Received
from tests.sim.tiny import tiny

STRATEGY = SimpleNamespace(state_dict=lambda: {"di/bank/labels": torch.tensor([1, 2])})


@pytest.fixture
def states(tmp_path: Path) -> States:
    return States(tmp_path, save_seconds=0.0)


def weights(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3,), value)}


def answers(value: float) -> dict[str, Tensor]:
    """What was answered, by nobody, beside something to tell it by."""
    return {**weights(value), **Received([], [], 0.0, {}).state_dict()}


def files(states: States) -> list[str]:
    return sorted(path.relative_to(states.folder).as_posix() for path in states.folder.rglob("*") if path.is_file())


def test_the_last_two_rounds_are_kept_and_the_newest_is_found(states: States) -> None:
    for round in (1, 2, 3):
        states.after_round(round, weights(round), STRATEGY)
    assert files(states) == ["round-00002.safetensors", "round-00003.safetensors"]
    done, state = states.newest()
    assert done == 3 and state.keys() == {"global/w", "strategy/di/bank/labels"} and torch.equal(state["global/w"], weights(3)["w"])


def test_without_a_state_it_is_round_0(states: States) -> None:
    assert states.newest() == (0, {})


def test_parts_replace_themselves_and_go_when_their_round_is_over(states: States) -> None:
    for value in (1.0, 2.0):
        states.save(1, "updates", answers(value))
        states.save(1, "student by di", weights(value))
    assert files(states) == ["round-00001/student-by-di.safetensors", "round-00001/updates.safetensors"]
    assert torch.equal(states.load(1, "student by di")["w"], weights(2)["w"]) and states.holds(1, "updates")
    assert states.load(2, "updates") == {} and not states.holds(2, "updates")
    states.after_round(1, weights(0), STRATEGY)
    assert files(states) == ["round-00001.safetensors"]


def test_a_state_is_due_when_the_last_one_is_old_enough(states: States, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock.now))
    slow = States(states.results, save_seconds=300.0)
    for seconds, due in ((299.0, False), (1.0, True)):
        clock.now += seconds
        assert slow.due() is due
    slow.save(1, "updates", answers(0))
    assert not slow.due()


# --- damage ---


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_part_is_passed_over_with_a_word(states: States, caplog: pytest.LogCaptureFixture) -> None:
    states.save(1, "updates", answers(1))
    states.save(1, "student by di", weights(1))
    cut(states.folder / "round-00001/student-by-di.safetensors")
    with caplog.at_level(logging.WARNING):
        assert states.load(1, "student by di") == {} and states.holds(1, "updates")
    assert "student-by-di.safetensors is damaged and passed over" in caplog.text


def test_parts_without_whole_updates_are_worth_nothing(states: States) -> None:
    """A student that was begun on other updates must not be gone on with."""
    states.save(1, "updates", answers(1))
    states.save(1, "student by di", weights(1))
    states.forget_parts(but=1)
    assert len(files(states)) == 2
    cut(states.folder / "round-00001/updates.safetensors")
    states.forget_parts(but=1)
    assert files(states) == []


def test_parts_of_other_rounds_are_removed(states: States) -> None:
    for round in (1, 2, 3):
        states.save(round, "updates", answers(round))
    states.forget_parts(but=2)
    assert files(states) == ["round-00002/updates.safetensors"]


# --- a full disk ---


@contextmanager
def small_files() -> Iterator[None]:
    """A true failure of writing: no file may grow beyond 4 KiB. What has been written by then must not be taken for the state."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk() -> Iterator[None]:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", fails)
        yield


@pytest.mark.parametrize(("failure", "reason"), [(full_disk, "No space left on device"), (small_files, ".*File too large.*")])
def test_a_state_that_cannot_be_written_is_one_line_and_the_one_before_stays(states: States, failure, reason: str) -> None:
    states.save(1, "student by di", weights(1))
    states.after_round(1, weights(1), STRATEGY)
    states.save(2, "student by di", weights(1))
    before, big = files(states), {"w": torch.zeros(10_000)}
    remedy = rf"Free some space, then go on with resume={states.results}: what was saved before is whole\.$"
    with failure():
        with pytest.raises(FedimprError, match=rf"^round 2, saving the state \(student by di\): cannot write \S+: {reason}\. {remedy}"):
            states.save(2, "student by di", big)
        with pytest.raises(FedimprError, match=rf"^round 2, saving the state: cannot write \S+: {reason}\. {remedy}"):
            states.after_round(2, big, STRATEGY)
    assert files(states) == before and states.newest()[0] == 1
    assert torch.equal(states.load(2, "student by di")["w"], weights(1)["w"])


# --- whose folder it is ---


def began(folder: Path, *more: str, status: str = "interrupted") -> Settings:
    """The settings of a run that was stopped after its first round, and what it left."""
    settings = tiny(folder, "rounds=2", *more, methods=["di"])
    with opened(settings) as (states, done, state):
        assert (done, state) == (0, {})
        states.after_round(1, weights(1), STRATEGY)
        states.save(2, "updates", answers(2))
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(settings.to_json()), sort_keys=False))
    (folder / "run.json").write_text(json.dumps({"status": status}))
    return settings


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    settings = began(tmp_path)
    resumed = tiny(tmp_path, "rounds=2", f"resume='{tmp_path}'", methods=["di"])
    for first in (settings, resumed):
        with opened(first):
            for key, second in (("output", settings), ("resume", resumed)):
                with pytest.raises(ConfigError, match=f"'{key}' is '{tmp_path}'; allowed: a folder that no other run is at work in"):
                    opened(second).__enter__()
    with opened(resumed):
        pass  # the lock went with the block


def test_a_fresh_run_takes_nothing_over(tmp_path: Path) -> None:
    settings = began(tmp_path)
    with opened(settings) as (states, done, _):
        assert done == 0 and files(states) == ["lock"]


def test_a_run_goes_on_in_its_own_folder_or_from_it(tmp_path: Path) -> None:
    began(tmp_path / "one")
    for target in ("one", "two"):
        with opened(tiny(tmp_path / target, "rounds=2", f"resume='{tmp_path / 'one'}'", methods=["di"])) as (states, done, state):
            assert states.results == tmp_path / target and done == 1 and torch.equal(state["global/w"], weights(1)["w"])
            assert states.holds(2, "updates")
    assert States(tmp_path / "two", 0.0).newest()[0] == 1  # so that the second can be resumed without the first


def test_what_decides_no_result_may_change(tmp_path: Path) -> None:
    began(tmp_path)
    with opened(tiny(tmp_path, "rounds=2", "save_seconds=1", "runtime=flower", f"resume='{tmp_path}'", methods=["di"])) as (_, done, _):
        assert done == 1


@pytest.mark.parametrize(
    ("more", "difference"),
    [(["training.lr=0.02"], "training.lr: 0.01 then, 0.02 now"), (["seed=7"], "seed: 0 then, 7 now")],
)
def test_another_configuration_is_refused_with_its_difference(tmp_path: Path, more: list[str], difference: str) -> None:
    began(tmp_path)
    with pytest.raises(ConfigError, match=f"'resume' is .*differs in {difference}$"):
        opened(tiny(tmp_path, "rounds=2", f"resume='{tmp_path}'", *more, methods=["di"])).__enter__()


def test_the_order_of_methods_decides_whose_student_leads(tmp_path: Path) -> None:
    settings = tiny(tmp_path, methods=["cmi", "di"])
    with opened(settings):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(settings.to_json()), sort_keys=False))
        (tmp_path / "run.json").write_text('{"status": "running"}')
    with pytest.raises(ConfigError, match="differs in the order of its keys"):
        opened(tiny(tmp_path, f"resume='{tmp_path}'", methods=["di", "cmi"])).__enter__()


def test_only_a_run_can_be_resumed_and_only_one_with_something_left(tmp_path: Path) -> None:
    settings = began(tmp_path / "run", status="finished")
    resumed = tiny(tmp_path / "run", "rounds=2", f"resume='{tmp_path / 'run'}'", methods=["di"])
    with opened(resumed) as (states, done, _):  # its last state is gone, or damaged: there is something left
        assert done == 1
        states.after_round(2, weights(2), STRATEGY)
    with pytest.raises(ConfigError, match="a run with rounds left; all 2 of this one are done"):
        opened(resumed).__enter__()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConfigError, match="the result folder of a run; this one has no readable run.json"):
        opened(resumed).__enter__()
    assert not settings.folder.exists()  # nothing was made in refusing


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="'output' is .*file.*; allowed: a folder that can be written to"):
        opened(tiny(tmp_path / "file", methods=["di"])).__enter__()
