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

from fedimpr.impressions import Bank
from fedimpr.observation import Features, Observation
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


class _OfLogits(Loss):
    """A loss that looks at logits alone."""

    def __init__(self, gap: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gap = gap

    def forward(self, student: Observation, teacher: Observation, places: Tensor) -> Tensor:
        return self.gap(student.logits, teacher.logits)
