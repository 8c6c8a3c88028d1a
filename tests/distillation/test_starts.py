"""Students that set out beside one another: the better half goes on until one is left."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fedimpr.distillation import Distillation, LogitMSE, Mining, Spent, Starts, mine_and_distil
from fedimpr.distillation.learning import Learner, Shown
from fedimpr.distillation.starts import last_left
from fedimpr.errors import ConfigError
from fedimpr.impressions import Bank, Source
from fedimpr.observation import Observation
from fedimpr.synthesis import silent
from fedimpr.views import Views
from tests.distillation.test_distil import STILL, Noise
from tests.makers import SHAPE, small_model

MOVING = Views(shift=0.1, scale=(0.8, 1.0), rotation=5.0, flip=True)


class Played:
    """A learner whose losses are given, and a diary of what it was shown."""

    def __init__(self, *losses: float) -> None:
        self.losses, self.shown, self.student = list(losses), list[int](), nn.Identity()

    def learn(self, shown: int) -> torch.Tensor:
        self.shown.append(shown)
        return torch.tensor(self.losses[len(self.shown) - 1])


def left(learners: list[Played], steps: int, progress=silent) -> int:
    views = itertools.count()
    student = last_left(learners, lambda: next(views), steps, progress)  # type: ignore[arg-type]
    (place,) = (place for place, learner in enumerate(learners) if learner.student is student)
    return place


def test_halves_by_hand() -> None:
    """Two steps, then the better two of four take four more; only the later half of the steps counts: the second, then the last two.

    First choice: 5, 1, 2, 3, so the first one leaves. Of the others the last leaves, too. Second choice: 4 + 4 against 1 + 9, so the second
    one is left, though the sum of all its four is the larger.
    """
    learners = [Played(0, 5), Played(9, 1, 9, 9, 4, 4), Played(9, 2, 0, 0, 1, 9), Played(9, 3)]
    ticks = []
    assert left(learners, 2, lambda stage, done, total, **info: ticks.append((stage, done, total, info["left"]))) == 1
    assert [learner.shown for learner in learners] == [[0, 1], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1]], "the same views for all"
    assert ticks == [("choosing a start", done, 6, 4 if done < 3 else 2) for done in range(1, 7)]


def test_of_an_odd_number_the_larger_half_goes_on() -> None:
    """Of three two, of two one: one step, then two of which the later one counts."""
    learners = [Played(3), Played(1, 0, 2), Played(2, 5, 1)]
    assert left(learners, 1) == 2 and [len(learner.shown) for learner in learners] == [1, 3, 3]


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_the_worst(lost: float) -> None:
    assert left([Played(lost), Played(1e9)], 1) == 1
    assert left([Played(1e9), Played(lost)], 1) == 0


def test_equal_ones_stay_in_their_order_and_one_alone_takes_no_step() -> None:
    assert left([Played(1), Played(1)], 1) == 0
    alone = Played()
    assert left([alone], 5) == 0 and not alone.shown


@pytest.mark.parametrize(("others", "steps", "shared"), [(0, 200, 0), (1, 5, 5), (2, 5, 15), (3, 5, 15), (15, 200, 3000)])
def test_steps_until_one_is_left(others: int, steps: int, shared: int) -> None:
    """Sixteen: 200 with all, 400 with eight, 800 with four, 1600 with two."""
    starts = Starts(others=[nn.Identity()] * others, steps=steps)
    learners = [Played(*[0.0] * shared) for _ in range(others + 1)]
    left(learners, steps)
    assert starts.shared == shared == max(len(learner.shown) for learner in learners)


def test_a_comparison_of_no_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps"):
        Starts(others=[], steps=0)


def test_a_student_of_another_architecture_is_refused_before_anything_is_mined() -> None:
    student = small_model(5)
    with pytest.raises(ConfigError, match=r"starts\.others\[1\].*the student's architecture"):
        distil(student, [small_model(6), small_model(7, batch_norm=False)])
    assert all(map(torch.equal, student.parameters(), small_model(5).parameters()))


def distil(student: nn.Module, others: list[nn.Module] | None, *, steps: int = 1, seed: int = 0, lr: float = 0.02, **changes) -> Spent:
    how = {"candidates": 2, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "views": STILL, "objective": LogitMSE(), **changes}
    return mine_and_distil(
        small_model(0),
        student,
        Noise(),
        mining=Mining(images=40, before=0, portions=2, capacity=40),
        distillation=Distillation(steps=steps, batch_size=8, lr=lr, **how),
        bank=Bank(40),
        source=Source("a model", "noise", 1, 0),
        shape=SHAPE,
        generator=torch.Generator().manual_seed(seed),
        starts=None if others is None else Starts(others=others, steps=3),
    )


def test_the_student_goes_on_from_the_best_start() -> None:
    """One of the others is the teacher itself; with hardly a step of its own the student ends beside it, and the passes are counted.

    Four students share 3 + 6 steps of 16 views, one step of 16 comes after, and the noise cost 3 passes an image.
    """
    student, others = small_model(5), [small_model(seed) for seed in (6, 0, 7)]
    spent = distil(student, others, steps=1, lr=1e-4)
    images = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(1))

    def apart(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(images) - small_model(0)(images)).square().mean().item()

    assert 10 * apart(student) < min(apart(small_model(seed)) for seed in (5, 6, 7))
    assert not student.training
    assert spent.teacher_passes == 3 * 40 + (9 + 1) * 16


def test_the_student_keeps_what_it_learned_before_the_choice_and_others_learn_in_place() -> None:
    """Of two copies the first is left. Three steps before the choice and one after it lead farther than a lone student's one step."""
    chosen, lone = small_model(5), small_model(5)
    others = [copy.deepcopy(chosen)]
    distil(chosen, others)
    distil(lone, None)
    own, other, alone, start = (next(model.parameters()) for model in (chosen, others[0], lone, small_model(5)))
    assert (own - start).norm() > 1.5 * (alone - start).norm()
    assert (own - other).norm() < (own - start).norm() and not torch.equal(other, start)


def test_same_generator_same_student_and_the_global_state_neither_matters_nor_moves() -> None:
    def made() -> Iterator[torch.Tensor]:
        student, others = small_model(5), [small_model(6), small_model(7)]
        for model in (student, *others):
            model.network.insert(len(model.network) - 1, nn.Dropout(0.5))
        distil(student, others, steps=4, views=MOVING)
        return student.parameters()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = list(made())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, one, made()))


def test_a_learner_keeps_to_the_views_it_is_farthest_off_on() -> None:
    """A student of zeros against logits of 1, 3 and 2: it learns from the second and the third, by squares (9 + 4) / 2."""
    student = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(student.weight)
    objective = LogitMSE().bound(student, student, Bank(1), (1, 1, 1), torch.Generator())
    learner = Learner(student=student, objective=objective, optimiser=torch.optim.SGD(student.parameters(), lr=0.25), batch_size=2)
    wanted = Observation(torch.tensor([[1.0], [3.0], [2.0]]), torch.zeros(2, 0), torch.zeros(3, 0))
    loss = learner.learn(Shown(images=torch.ones(3, 1), places=torch.arange(3), wanted=wanted))
    assert loss == 6.5 and not loss.requires_grad
    assert student.weight.item() == pytest.approx(0.25 * 5), "the slope is -(6 + 4) / 2"
