"""Data-free distillation: mine a portion of impressions, let the student learn from all that are held, and again.

With one portion this is the two-stage scheme of ZSKD (Nayak et al., ICML 2019, algorithm 1); with many it is the alternation of CMI
(Fang et al., IJCAI 2021, algorithm 1). The loss is the soft one alone; the result is the student after the last step; no label of real
data is ever looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Bank, Source
from fedimpr.observation import frozen
from fedimpr.synthesis.base import Progress, Synthesizer, silent
from fedimpr.views import Views


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
class Mining:
    """How many impressions a method mines, and when.

    Attributes:
        images: impressions altogether.
        portions: they are mined in this many equal portions, each followed by an equal share of the student's steps; the last takes the
            rest.
        capacity: of the bank.
    """

    images: int
    portions: int
    capacity: int

    def __post_init__(self) -> None:
        for key in ("portions", "capacity"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
        if self.images < self.portions:
            raise ConfigError("images", self.images, f"an integer >= portions ({self.portions})")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the student learns from impressions that the teacher labels anew in each view.

    Attributes:
        steps: optimiser steps altogether.
        batch_size: impressions per step.
        lr: peak learning rate of SGD with Nesterov momentum; falls to zero along a cosine.
        momentum: in [0, 1).
        weight_decay: >= 0.
        temperature: T of the soft loss.
        views: augmentation of the impressions, the same view for teacher and student.
    """

    steps: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    temperature: float
    views: Views

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "lr", "temperature"):
            if getattr(self, key) <= 0:
                raise ConfigError(key, getattr(self, key), "a number > 0")
        if not 0 < self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "a number in (0, 1)")


def mine_and_distil(
    teacher: nn.Module,
    student: nn.Module,
    synthesizer: Synthesizer,
    *,
    mining: Mining,
    distillation: Distillation,
    bank: Bank,
    source: Source,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    progress: Progress = silent,
) -> int:
    """Train ``student`` in place; return how many images went through the teacher.

    Args:
        teacher: maps images to logits; left as it was found.
        student: the model that learns, on the teacher's device.
        synthesizer: the method that mines.
        mining: how many impressions, and when.
        distillation: how the student learns.
        bank: where impressions are held; those of earlier rounds are learned from too.
        source: written beside the new impressions.
        shape: (C, H, W).
        generator: the source of all randomness.
        progress: told after every step.

    Raises:
        FedimprError: the student's loss is not finite.
    """
    sgd = torch.optim.SGD(
        student.parameters(), distillation.lr, distillation.momentum, weight_decay=distillation.weight_decay, nesterov=True
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, distillation.steps)
    passes, loss = 0, torch.zeros(())
    for portion in range(mining.portions):
        count = _share(mining.images, portion, mining.portions)
        told = _part(progress, portion, mining.portions)
        impressions = synthesizer.synthesize(teacher, count, generator, shape=shape, student=student, progress=told)
        bank.add(impressions, source)
        passes += impressions.teacher_passes
        student.train()
        # Frozen once for the whole portion; isolated because the student may have dropout.
        with frozen(teacher), seeds.isolated(seeds.draw_seed(generator)):
            for _ in range(_share(distillation.steps, portion, mining.portions)):
                images = distillation.views(bank.sample(distillation.batch_size, generator)[0], generator)
                with torch.no_grad():
                    wanted = teacher(images)
                loss = soft_divergence(student(images), wanted, distillation.temperature)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                cosine.step()
                progress("distilling", cosine.last_epoch, distillation.steps, loss=loss.detach())
        student.eval()
    if not bool(loss.isfinite()):
        value = float(loss.detach())
        raise FedimprError("the student's loss is not finite", stage="distillation", value=value, remedy="Lower distillation.lr.")
    return passes + distillation.steps * distillation.batch_size


def _share(total: int, portion: int, portions: int) -> int:
    """The size of one of ``portions`` parts of ``total`` that differ by one at most."""
    return total * (portion + 1) // portions - total * portion // portions


def _part(progress: Progress, portion: int, portions: int) -> Progress:
    """The progress of one portion as a part of all."""

    def told(stage: str, done: int, total: int, **info: object) -> None:
        progress(stage, portion * total + done, portions * total, **info)

    return told
