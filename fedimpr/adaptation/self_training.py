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
        replay: weight of the impressions, >= 0; at 0 none are needed.
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
        """Impressions, where they have a weight."""
        return frozenset({"impressions"}) if self.replay > 0 else frozenset()

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> _AtWork:
        """As :class:`~fedimpr.adaptation.learning.Method`."""
        return _AtWork(self, model, given, generator)


class _AtWork:
    def __init__(self, method: SelfTraining, model: nn.Module, given: Given, generator: torch.Generator) -> None:
        self.method, self.model, self.generator = method, model, generator
        self.replay = Replay(model, given, method.replayed, generator) if method.replay > 0 else None

    def parameters(self) -> list[nn.Parameter]:
        """All of the model."""
        return list(self.model.parameters())

    def before_pass(self) -> None:
        """Nothing."""

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """As the class says."""
        method, strong = self.method, self.method.strong(images, self.generator)
        both: Tensor = self.model(torch.cat([images, strong])).float()
        logits, answered = both.chunk(2)
        largest, answers = logits.detach().softmax(1).max(1)
        learnt = F.cross_entropy(answered, answers, reduction="none") * (largest > method.gate)
        loss: Tensor = method.consistency * learnt.mean() + method.information * information_loss(logits)
        return loss if self.replay is None else loss + method.replay * self.replay(len(images))[1]
