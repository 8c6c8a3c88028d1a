"""Distillation objectives: how far a student's answer is from its teacher's.

An objective is a value; :meth:`Objective.bound` makes the loss of one distillation, a module whose parameters, if any, learn beside the
student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import device_of
from fedimpr.errors import ConfigError
from fedimpr.impressions import Bank
from fedimpr.observation import Features, Observation, frozen, observe
from fedimpr.synthesis.base import require


class Loss(nn.Module, ABC):
    """The loss of one distillation.

    Attributes:
        features: the features of teacher and student that it looks at, or ``None``.
    """

    features: Features | None = None

    @abstractmethod
    def forward(self, student: Observation, teacher: Observation, places: Tensor) -> Tensor:
        """A scalar, the mean over the batch.

        Args:
            student: what the student showed on N images.
            teacher: what the teacher showed on the same images; no gradient flows into it.
            places: (N,), where in the bank the images stand.
        """


class Objective(Protocol):
    """A distillation objective; its fields are its hyper-parameters and have no defaults."""

    def bound(self, teacher: nn.Module, student: nn.Module, bank: Bank, shape: tuple[int, int, int], generator: torch.Generator) -> Loss:
        """The loss of one distillation.

        Args:
            teacher: in eval mode.
            student: the model that learns.
            bank: whose images the student will learn from; it may be empty yet.
            shape: (C, H, W) of the images.
            generator: the source of all randomness.
        """


def soft_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over the batch (Hinton, Vinyals, Dean 2015).

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K).
        temperature: T > 0; the factor T^2 keeps the gradient's size when T changes.
    """
    student = F.log_softmax(student_logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True, kw_only=True)
class SoftDivergence:
    """The soft loss of Hinton, Vinyals and Dean (2015), see :func:`soft_divergence`.

    Attributes:
        temperature: T > 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        require(self, above_zero=("temperature",))

    def bound(self, teacher: nn.Module, student: nn.Module, bank: Bank, shape: tuple[int, int, int], generator: torch.Generator) -> Loss:
        """As :meth:`Objective.bound`."""
        return _OfLogits(lambda mine, wanted: soft_divergence(mine, wanted, self.temperature))


@dataclass(frozen=True, kw_only=True)
class LogitL1:
    """The mean absolute difference of the logits (DFAD, Fang et al., 2019)."""

    def bound(self, teacher: nn.Module, student: nn.Module, bank: Bank, shape: tuple[int, int, int], generator: torch.Generator) -> Loss:
        """As :meth:`Objective.bound`."""
        return _OfLogits(F.l1_loss)


@dataclass(frozen=True, kw_only=True)
class LogitMSE:
    """The mean square of the difference of the logits (Ba and Caruana, NeurIPS 2014)."""

    def bound(self, teacher: nn.Module, student: nn.Module, bank: Bank, shape: tuple[int, int, int], generator: torch.Generator) -> Loss:
        """As :meth:`Objective.bound`."""
        return _OfLogits(F.mse_loss)


@dataclass(frozen=True, kw_only=True)
class Hints:
    """Another objective, and the mean squared difference of the features before the final layers.

    Such features are the hints of FitNets (Romero et al., ICLR 2015), there of a layer in the middle and before the objective's own steps.
    Logits tell of a teacher's features only what its final layer looks at. A student that learns all of them is a little nearer to it
    on images unlike the impressions that it learned from: see ``benchmarks/results/methods_mnist.md``.

    Attributes:
        objective: of the logits, or of the same features.
        weight: of the hints, >= 0; their size is that of the features' squares.
    """

    objective: Objective
    weight: float

    def __post_init__(self) -> None:
        require(self, at_least_zero=("weight",))

    def bound(self, teacher: nn.Module, student: nn.Module, bank: Bank, shape: tuple[int, int, int], generator: torch.Generator) -> Loss:
        """As :meth:`Objective.bound`.

        Where a student has more or fewer features than its teacher, a linear regressor that learns beside it turns them into as many.

        Raises:
            TeacherError: teacher or student has no final linear layer to take features from.
            ConfigError: the objective looks at other features.
        """
        loss = self.objective.bound(teacher, student, bank, shape, generator)
        if loss.features not in (None, "penultimate"):
            raise ConfigError("objective", type(self.objective).__name__, "one of the logits, or of the features before the final layer")
        wanted, mine = penultimate_sizes(teacher, student, shape)
        with seeds.isolated(seeds.draw_seed(generator)):
            regressor = nn.Identity() if mine == wanted else nn.Linear(mine, wanted)
        return _WithHints(loss, regressor, self.weight)


def penultimate_sizes(teacher: nn.Module, student: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """How many features enter the final layers of a teacher and of a student on images (C, H, W).

    Raises:
        TeacherError: one of them has no final linear layer.
    """
    black = torch.zeros(1, *shape, device=device_of(teacher))
    with torch.no_grad(), frozen(student):
        of_teacher, of_student = (observe(model, black, features="penultimate").features.shape[1] for model in (teacher, student))
    return of_teacher, of_student


class _WithHints(Loss):
    """A loss, and hints beside it."""

    features: Features | None = "penultimate"

    def __init__(self, loss: Loss, regressor: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.regressor, self.weight = loss, regressor, weight

    def forward(self, student: Observation, teacher: Observation, places: Tensor) -> Tensor:
        loss: Tensor = self.loss(student, teacher, places)
        return loss + self.weight * F.mse_loss(self.regressor(student.features), teacher.features)


class _OfLogits(Loss):
    """A loss that looks at logits alone."""

    def __init__(self, gap: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gap = gap

    def forward(self, student: Observation, teacher: Observation, places: Tensor) -> Tensor:
        return self.gap(student.logits, teacher.logits)
