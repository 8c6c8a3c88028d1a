"""A distillation that was stopped at any safe point goes on to the student, the bank and the generator of one that was not."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedimpr.distillation import (
    ContrastiveRepresentation,
    Distillation,
    Hints,
    Mining,
    Objective,
    SoftDivergence,
    Spent,
    Starts,
    mine_and_distil,
)
from fedimpr.errors import FedimprError
from fedimpr.impressions import Bank, Source
from fedimpr.synthesis import Synthesizer
from fedimpr.views import Views
from sim.config import Settings
from sim.federation import methods_of
from tests.makers import SHAPE, small_model
from tests.sim.tiny import tiny

SOFT = SoftDivergence(temperature=2.0)
CRD = ContrastiveRepresentation(
    temperature=2.0, weight=0.5, projection=4, negatives=8, contrast_temperature=0.1, momentum=0.5, normalised=True
)
MOVING = Views(shift=0.1, scale=(0.8, 1.0), rotation=5.0, flip=True)
MINING = Mining(images=24, before=8, portions=2, capacity=20)
STEPS = 5
# One after the impressions that come before, one after each portion of them, one after each step, and the end.
SAFE_POINTS = 1 + MINING.portions + STEPS + 1


class Stopped(BaseException):
    """The power went."""


class Memory:
    """Keeps each state that it is given; after ``stop`` of them the power goes."""

    def __init__(self, before: Mapping[str, Tensor] | None = None, stop: int | None = None) -> None:
        self.before, self.stop = before or {}, stop
        self.states: list[dict[str, Tensor]] = []

    def load(self) -> Mapping[str, Tensor]:
        return self.before

    def due(self) -> bool:
        return True

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.states.append(dict(state))
        if len(self.states) == self.stop:
            raise Stopped


@functools.lru_cache
def settings_of(method: str) -> Settings:
    return tiny(Path("unused"), methods=[method])


def student(dropout: bool) -> nn.Module:
    model = small_model(5)
    if dropout:
        model.network.insert(len(model.network) - 1, nn.Dropout(0.5))
    return model


class Attempt:
    """One process: everything is new but for what was saved."""

    def __init__(self, method: str, dropout: bool = False) -> None:
        self.student, self.bank, self.generator = student(dropout), Bank(MINING.capacity), torch.Generator().manual_seed(3)
        self.synthesizer: Synthesizer = methods_of(settings_of(method))[method].synthesizer

    def run(self, saves: Memory | None, objective: Objective = SOFT, optimizer: str = "sgd", others: int = 0, **changes) -> Spent:
        values = {"steps": STEPS, "batch_size": 8, "candidates": 1, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "views": MOVING}
        return mine_and_distil(
            small_model(0),
            self.student,
            self.synthesizer,
            mining=MINING,
            distillation=Distillation(**{**values, "objective": objective, "optimizer": optimizer, **changes}),
            bank=self.bank,
            source=Source("a model", "any", 1, 0),
            shape=SHAPE,
            generator=self.generator,
            saves=saves,
            starts=Starts(others=[small_model(6 + place) for place in range(others)], steps=2) if others else None,
        )

    def end(self) -> dict[str, Tensor]:
        """All that a run leaves behind."""
        parts = {"student": self.student, "bank": self.bank, "synthesizer": self.synthesizer}
        state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        return {**state, "generator": self.generator.get_state()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("method", "settings", "dropout"),
    [
        ("di", {"optimizer": "sgd"}, False),
        ("di", {"optimizer": "adam"}, True),
        ("di", {"optimizer": "muon"}, False),
        ("di", {"optimizer": "sgd", "candidates": 3}, True),
        ("di", {"optimizer": "muon", "others": 2}, False),
        ("cmi", {"optimizer": "adam", "others": 1, "objective": CRD}, False),
        ("di", {"optimizer": "sgd", "objective": CRD}, False),
        ("di", {"optimizer": "muon", "candidates": 2, "others": 1, "objective": Hints(objective=SOFT, weight=2.0)}, False),
        ("cmi", {"optimizer": "adam", "objective": CRD}, False),  # a projection head and a memory
        ("fast", {"optimizer": "sgd"}, True),  # a generator, its optimiser and an average
    ],
)
def test_stopped_at_any_safe_point_it_goes_on_to_the_same_bits(method: str, settings: dict, dropout: bool) -> None:
    straight, memory = Attempt(method, dropout), Memory()
    spent = straight.run(memory, **settings)
    assert len(memory.states) == SAFE_POINTS
    for point, state in enumerate(memory.states):
        torch.rand(point + 1)  # another process has another global state
        after = Attempt(method, dropout)
        again = after.run(Memory(state), **settings)
        assert same(after.end(), straight.end()), f"stopped at safe point {point}"
        assert (again.teacher_passes, again.mining_passes) == (spent.teacher_passes, spent.mining_passes)


def test_it_may_be_stopped_again_and_again() -> None:
    """Each attempt lives for one safe point, so there are as many as safe points, and a last one that finds all done."""
    straight, attempts, state = Attempt("cmi"), 0, None
    straight.run(None)
    while attempts < SAFE_POINTS:
        memory, attempts = Memory(state, stop=1), attempts + 1
        with pytest.raises(Stopped):
            Attempt("cmi").run(memory)
        state = memory.states[-1]
    last = Attempt("cmi")
    last.run(Memory(state))
    assert same(last.end(), straight.end())


def test_saving_changes_nothing() -> None:
    plain, saved, memory = Attempt("cmi", dropout=True), Attempt("cmi", dropout=True), Memory()
    plain.run(None)
    saved.run(memory)
    assert same(plain.end(), saved.end()) and len(memory.states) == SAFE_POINTS


def test_between_two_savings_only_the_end_is_saved() -> None:
    memory = Memory()
    memory.due = lambda: False
    Attempt("di").run(memory)
    assert len(memory.states) == 1


def test_portions_without_a_step_draw_what_they_would_have_drawn() -> None:
    """One step for two portions belongs to the second: the first one only draws the seed of its dropout."""
    straight, memory = Attempt("di", dropout=True), Memory()
    straight.run(memory, steps=1)
    for state in memory.states:
        after = Attempt("di", dropout=True)
        after.run(Memory(state), steps=1)
        assert same(after.end(), straight.end())


def test_a_loss_that_was_lost_before_the_stop_is_still_an_error() -> None:
    memory = Memory(stop=SAFE_POINTS - 1)  # after the last step, before anybody looked
    with pytest.raises(Stopped):
        Attempt("di").run(memory, lr=1e30)
    with pytest.raises(FedimprError, match="distillation: the student's loss is not finite"):
        Attempt("di").run(Memory(memory.states[-1]), lr=1e30)


def test_time_before_the_stop_counts() -> None:
    memory = Memory(stop=SAFE_POINTS - 1)
    with pytest.raises(Stopped):
        Attempt("di").run(memory)
    state, hour = memory.states[-1], 3600.0
    note = bytes(state["note"].tolist()).decode().replace('"mining": ', f'"mining": {int(hour)}')  # 0.01 becomes 36000.01
    spent = Attempt("di").run(Memory({**state, "note": torch.tensor(list(note.encode()), dtype=torch.uint8)}))
    assert spent.mining_seconds >= hour and 0 < spent.distilling_seconds < hour
