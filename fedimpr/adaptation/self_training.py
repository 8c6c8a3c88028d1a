"""Self-training beside impressions.

Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang, Raffel: *FixMatch: Simplifying Semi-Supervised Learning with Consistency and
Confidence*, NeurIPS 2020 (arXiv 2001.07685): what a model answers with confidence for a weakly changed image is what it shall answer for
the same image changed strongly.

Differences: the labelled images are impressions with soft targets, and SHOT's information loss (weight 0 leaves it out) keeps all classes
in use from the first step on, when few answers are confident. Strong changes are moves, blur and contrast; there is no RandAugment and no
cutout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr.adaptation.aligned import Replay
from fedimpr.adaptation.information import information_loss
from fedimpr.adaptation.learning import Given, Need
from fedimpr.errors import ConfigError
from fedimpr.synthesis.base import require
from fedimpr.views import Augmentation


@dataclass(frozen=True, kw_only=True)
class SelfTraining:
    """``replay * CE(impressions) + consistency * CE(strong view, confident answer) + information * information_loss(target)``.

    Attributes:
        replay: weight of the impressions, >= 0.
        consistency: >= 0.
        gate: the probability above which an answer is learnt from, in [0, 1); 0.95 in the paper.
        information: >= 0.
        strong: the strong change; what the turn's views give is the weak one.
        replayed: augmentation of the impressions.
    """

    replay: float
    consistency: float
    gate: float
    information: float
    strong: Augmentation
    replayed: Augmentation

    def __post_init__(self) -> None:
        require(self, at_least_zero=("replay", "consistency", "information"))
        if not 0 <= self.gate < 1:
            raise ConfigError("gate", self.gate, "a number in [0, 1)")

    @property
    def needs(self) -> frozenset[Need]:
        """Impressions."""
        return frozenset({"impressions"})

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> _AtWork:
        """As :class:`~fedimpr.adaptation.learning.Method`."""
        return _AtWork(self, model, given, generator)


class _AtWork:
    def __init__(self, method: SelfTraining, model: nn.Module, given: Given, generator: torch.Generator) -> None:
        self.method, self.model, self.generator = method, model, generator
        self.replay = Replay(model, given, method.replayed, generator)

    def parameters(self) -> list[nn.Parameter]:
        """All of the model."""
        return list(self.model.parameters())

    def before_pass(self) -> None:
        """Nothing."""

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """As the class says."""
        _, replayed = self.replay(len(images))
        logits, strong = self.model(torch.cat([images, self.method.strong(images, self.generator)])).float().chunk(2)
        largest, answers = logits.detach().softmax(1).max(1)
        learnt = F.cross_entropy(strong, answers, reduction="none") * (largest > self.method.gate)
        return (
            self.method.replay * replayed
            + self.method.consistency * learnt.mean()
            + self.method.information * information_loss(logits)
        )
