"""Contrastive representation distillation (CRD).

Tian, Krishnan, Isola: *Contrastive Representation Distillation*, ICLR 2020 (arXiv 1910.10699).

The student learns features that tell which image the teacher's features are of. Teacher and student get a linear embedding each; a critic
of two embeddings has to know the pair of one image from pairs of an image and any other.

Differences: the data set is the bank, so M, the number of images to choose from, grows until the bank is full. Where an impression takes
the place of an older one, that place remembers the old one until its next use. Negatives are drawn with replacement and may be the image
itself. An image that stands in a batch twice is remembered by the mean of its embeddings. As in the authors' code, the partner of an
embedding, positive or negative, is a remembered one.

The text's critic is exp(cosine / tau) / (exp(cosine / tau) + N / M). It takes the exponential for a probability, which it is not: with the
published numbers, nearly all negatives are taken for positives in the beginning, and the loss is in the tens of thousands.
``normalised=True`` follows the authors' code, which divides the exponential by a constant for each direction: an estimate, made of the
first batch, of its sum over the M places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import device_of
from fedimpr.distillation.objectives import Loss, penultimate_sizes, soft_divergence
from fedimpr.errors import ConfigError
from fedimpr.impressions import Bank
from fedimpr.observation import Features, Observation
from fedimpr.synthesis.base import require


@dataclass(frozen=True, kw_only=True)
class ContrastiveRepresentation:
    """The soft loss plus a contrast between penultimate features of teacher and student.

    Attributes:
        temperature: T > 0 of the soft loss.
        weight: of the contrast, >= 0.
        projection: size D of an embedding.
        negatives: N, how many places of the bank each image is contrasted with.
        contrast_temperature: tau > 0 that divides the cosines.
        momentum: share that a remembered embedding keeps when its image is seen again, in [0, 1).
        normalised: whether exponentials are divided by an estimate of their sum (see the module's text).
    """

    temperature: float
    weight: float
    projection: int
    negatives: int
    contrast_temperature: float
    momentum: float
    normalised: bool

    def __post_init__(self) -> None:
        require(self, above_zero=("temperature", "projection", "negatives", "contrast_temperature"), at_least_zero=("weight",))
        if not 0 <= self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "a number in [0, 1)")

    def bound(self, teacher: nn.Module, student: nn.Module, bank: Bank, shape: tuple[int, int, int], generator: torch.Generator) -> Loss:
        """As :meth:`Objective.bound`.

        Raises:
            TeacherError: teacher or student has no final linear layer to take penultimate features from.
        """
        of_teacher, of_student = penultimate_sizes(teacher, student, shape)
        with seeds.isolated(seeds.draw_seed(generator)):
            return _Contrast(self, bank, of_teacher, of_student, seeds.on_device(generator, device_of(teacher)))


class _Contrast(Loss):
    """The loss of one distillation; its memories hold unit vectors (capacity, D)."""

    features: Features | None = "penultimate"
    of_teacher: Tensor
    of_student: Tensor
    log_means: Tensor

    def __init__(self, settings: ContrastiveRepresentation, bank: Bank, teacher: int, student: int, random: torch.Generator) -> None:
        super().__init__()
        self.settings, self.bank, self.random = settings, bank, random
        self.embed_teacher, self.embed_student = (nn.Linear(size, settings.projection) for size in (teacher, student))
        for name in ("of_teacher", "of_student"):
            self.register_buffer(name, F.normalize(2 * torch.rand(bank.capacity, settings.projection) - 1, dim=1))
        # Of the exponentials of either direction, in the first batch; not a number before it.
        self.register_buffer("log_means", torch.full((2,), torch.nan))

    def forward(self, student: Observation, teacher: Observation, places: Tensor) -> Tensor:
        soft = soft_divergence(student.logits, teacher.logits, self.settings.temperature)
        with torch.autocast(places.device.type, enabled=False):  # a cosine is divided by a small number: it needs all its digits
            mine = F.normalize(self.embed_student(student.features), dim=1)
            theirs = F.normalize(self.embed_teacher(teacher.features), dim=1)
            n, held = self.settings.negatives, len(self.bank)
            negatives = torch.randint(held, (len(places), n), generator=self.random, device=places.device)
            drawn = torch.cat([places[:, None], negatives], 1)
            # All products and then a choice: that takes less memory than a copy of every drawn vector.
            pairs = ((mine, self.of_teacher), (theirs, self.of_student))
            scores = [(unit @ memory[:held].T).gather(1, drawn) / self.settings.contrast_temperature for unit, memory in pairs]
            contrast = sum(noise_contrast(s, threshold) for s, threshold in zip(scores, self._thresholds(scores), strict=True))
            self.of_teacher = remembered(self.of_teacher, theirs.detach(), places, self.settings.momentum)
            self.of_student = remembered(self.of_student, mine.detach(), places, self.settings.momentum)
        return soft + self.settings.weight * contrast

    def _thresholds(self, scores: list[Tensor]) -> list[Tensor]:
        """For either direction, the logarithm of what the critic compares exponentials with."""
        n, held = self.settings.negatives, len(self.bank)
        if not self.settings.normalised:
            return [torch.full_like(s[0, 0], math.log(n / held)) for s in scores]
        now = torch.stack([s.detach().flatten().logsumexp(0) - math.log(s.numel()) for s in scores])
        self.log_means = torch.where(self.log_means.isnan(), now, self.log_means)
        return list(math.log(n) + self.log_means)  # N / M times a sum over M places, M times the mean


def noise_contrast(scores: Tensor, threshold: Tensor) -> Tensor:
    """``-log h(positive) - sum over negatives of log(1 - h(negative))``, the mean over the batch; a scalar (CRD).

    The critic is ``h = exp(score) / (exp(score) + exp(threshold))``.

    Args:
        scores: (B, 1 + N), cosines over tau; the positive's first.
        threshold: a scalar.
    """
    gaps = scores - threshold
    return -(F.logsigmoid(gaps[:, 0]) + F.logsigmoid(-gaps[:, 1:]).sum(1)).mean()


def remembered(memory: Tensor, units: Tensor, places: Tensor, momentum: float) -> Tensor:
    """A memory (capacity, D) of unit vectors after new ones were mixed in: a copy.

    Args:
        memory: unit vectors (capacity, D).
        units: unit vectors (B, D), what was seen; those of one place count with their mean.
        places: (B,), where they belong.
        momentum: share of the old vector.
    """
    same = (places[:, None] == places).to(units.dtype)
    seen = same @ units / same.sum(1, keepdim=True)
    return memory.index_put((places,), F.normalize(momentum * memory[places] + (1 - momentum) * seen, dim=1))
