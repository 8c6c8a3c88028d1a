"""Hints: features before the final layers, beside another objective."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedimpr import seeds
from fedimpr.distillation import ContrastiveRepresentation, Hints, LogitL1, LogitMSE
from fedimpr.distillation.objectives import Loss
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.impressions import Bank
from fedimpr.observation import Observation, observe
from tests.makers import SHAPE, small_ensemble, small_model

PLACES = torch.tensor([0, 0])


def perceptron(seed: int, features: int) -> nn.Module:
    with seeds.isolated(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(SHAPE[0] * SHAPE[1] * SHAPE[2], features), nn.ReLU(), nn.Linear(features, 2)).eval()


def bound(teacher: nn.Module, student: nn.Module, **changes) -> Loss:
    hints = Hints(**{"objective": LogitMSE(), "weight": 1.0, **changes})
    return hints.bound(teacher, student, Bank(4), SHAPE, torch.Generator().manual_seed(0))


def seen(logits: list[list[float]], features: list[list[float]]) -> Observation:
    return Observation(torch.tensor(logits), torch.zeros(2, 0), torch.tensor(features))


def test_by_hand() -> None:
    """Gaps of the logits 1, -2, 0 and 3: 6 / 4 in L1. Gaps of the features 2, 0, -1, 1, 0 and 3: 15 / 6 in squares."""
    student = seen([[1.0, 0.0], [2.0, 4.0]], [[2.0, 1.0, 0.0], [1.0, 0.0, 3.0]])
    teacher = seen([[0.0, 2.0], [2.0, 1.0]], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    for weight in (0.0, 0.4, 2.0):
        loss = bound(perceptron(0, 3), perceptron(1, 3), objective=LogitL1(), weight=weight)
        assert loss(student, teacher, PLACES).item() == pytest.approx(6 / 4 + weight * 15 / 6)


def test_features_of_one_size_are_compared_as_they_are() -> None:
    """So a copy of the teacher, which ``inherit`` may start from, has no loss, and nothing but the student learns."""
    teacher, images = small_model(0), torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    loss = bound(teacher, small_model(0))
    assert not list(loss.parameters())
    shown = observe(teacher, images, features=loss.features)
    assert shown.features.shape[1] > 0 and loss(shown, shown, PLACES).item() == 0


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_student_of_other_features_is_read_by_a_regressor(ensemble: bool) -> None:
    """An ensemble's features are those of all members; what a linear map makes of the student's can be learnt alone, and is."""
    teacher, student = small_ensemble(2) if ensemble else perceptron(0, 7), perceptron(1, 64)
    loss = bound(teacher, student, objective=LogitMSE(), weight=3.0)
    images = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mine, wanted = (observe(model, images, features=loss.features) for model in (student, teacher))
    regressor = dict(loss.named_parameters())["regressor.weight"]
    assert regressor.shape == (wanted.features.shape[1], 64)
    mine = mine._replace(logits=wanted.logits)  # what is left is the hints' loss
    before = loss(mine, wanted, PLACES).item()
    descent = torch.optim.LBFGS(loss.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        descent.zero_grad()
        now = loss(mine, wanted, PLACES)
        now.backward()
        return now

    descent.step(closure)
    assert loss(mine, wanted, PLACES).item() < 1e-3 * before


def test_the_regressor_comes_from_the_generator_and_from_nothing_else() -> None:
    first = bound(perceptron(0, 7), perceptron(1, 4))
    torch.rand(3)
    again = bound(perceptron(0, 7), perceptron(1, 4))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))


def test_contrast_and_hints_go_together() -> None:
    contrast = ContrastiveRepresentation(
        temperature=4.0, weight=0.8, projection=8, negatives=4, contrast_temperature=0.07, momentum=0.5, normalised=True
    )
    loss = bound(perceptron(0, 3), perceptron(1, 3), objective=contrast)
    assert loss.features == "penultimate" and len(list(loss.parameters())) == 4


class OfBatchNorm:
    """An objective of other features."""

    def bound(self, *_: object) -> Loss:
        class Elsewhere(Loss):
            features = "batch_norm"

            def forward(self, student: Observation, teacher: Observation, places: torch.Tensor) -> torch.Tensor:
                return student.features.sum()

        return Elsewhere()


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight.*-1"):
        Hints(objective=LogitMSE(), weight=-1.0)
    with pytest.raises(ConfigError, match=r"objective.*OfBatchNorm.*before the final layer"):
        bound(perceptron(0, 3), perceptron(1, 3), objective=OfBatchNorm())
    with pytest.raises(TeacherError, match="no linear layer that makes the logits"):
        bound(nn.Flatten(), perceptron(1, 3))
