"""One answer: on every runner, and however often a run is stopped, the weights are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sim.checkpoint import States
from sim.config import CONFIGS
from sim.flower import run_experiment
from sim.local import run_local
from sim.on_ray import run_on_ray
from tests.sim.tiny import assert_same, overrides, tiny

STRATEGIES = sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml"))
NEEDS = {
    "adapting": (
        "strategy.targets=[2]",
        "adaptation=[kd3a,self_training]",
        *(f"adaptation.{w}.steps=3" for w in ("kd3a", "self_training")),
    ),
    "continual": (
        *("tasks=class_incremental", "tasks.scenario.tasks=[4,3,3]", "tasks.rounds=1", "partition=iid"),  # three tasks are ROUNDS
        *("strategy.rehearsal.replay_labels=1.0", "strategy.rehearsal.replay_distil=1.0"),
    ),
    "fedbuff": ("devices=phones", "strategy.buffer=2"),
}
STRAGGLERS = ("clients=6", "devices=phones", "deadline=0.18", "strategy.minimum_updates=1")  # of turns that take from 0.08 s to 0.23 s
CASES = [
    *((f"strategy={name}", *NEEDS.get(name, ())) for name in STRATEGIES),
    *((f"strategy={name}", "clients=5", "clients_per_node=2", "cohort=4", *NEEDS.get(name, ())) for name in STRATEGIES),
    *(
        (f"strategy={name}", *NEEDS.get(name, ()), *STRAGGLERS) for name in STRATEGIES if name not in ("adapting", "continual")
    ),  # which have no clock
    ("strategy=fedavg", "strategy.partial_sums=true", "evaluate_clients=false", "clients=5", "clients_per_node=2"),
]
ROUNDS = 3

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ray leaves pipes to the garbage collector
]


class Stopped(BaseException):
    """The power went."""


@contextmanager
def stopping(after: int) -> Iterator[None]:
    """Let the power go once a round is on disk."""
    write = States.after_round

    def stops(self: States, round: int, *rest: Any) -> None:
        write(self, round, *rest)
        if round == after:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(States, "after_round", stops)
        yield


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_every_runner_and_every_interruption_ends_in_the_same_weights(tmp_path: Path, case: tuple[str, ...]) -> None:
    asked = (*case, *([] if "strategy=continual" in case else [f"rounds={ROUNDS}"]))
    run_local(tiny(tmp_path / "local", *asked, methods=["di"]))
    folder = tmp_path / "stopped after every round"
    for done in range(1, ROUNDS):
        with stopping(after=done), pytest.raises(Stopped):
            run_local(tiny(folder, *asked, *([f"resume='{folder}'"] if done > 1 else []), methods=["di"]))
    run_local(tiny(folder, *asked, f"resume='{folder}'", methods=["di"]))
    assert_same(tmp_path / "local", folder)
    for workers in (1, 2):
        run_on_ray(tiny(tmp_path / f"ray-{workers}", *asked, "runtime=ray", f"runtime.workers={workers}", methods=["di"]))
        assert_same(tmp_path / "local", tmp_path / f"ray-{workers}")
    settings = tiny(tmp_path / "flower", *asked, "runtime=flower", methods=["di"])
    assert run_experiment(settings, overrides(*asked, "runtime=flower", methods=["di"])) == 0
    assert_same(tmp_path / "local", tmp_path / "flower")
