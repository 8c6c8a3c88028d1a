"""Supervised training on the target's labels: what no method may do, as the upper end of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr.adaptation.learning import Given, Need


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The cross-entropy with the true labels."""

    @property
    def needs(self) -> frozenset[Need]:
        """Labels: it breaks the rule."""
        return frozenset({"labels"})

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> _AtWork:
        """As :class:`~fedimpr.adaptation.learning.Method`."""
        assert given.labels is not None  # it was asked for
        return _AtWork(model, given.labels)


class _AtWork:
    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        self.model, self.labels = model, labels

    def parameters(self) -> list[nn.Parameter]:
        """All of the model."""
        return list(self.model.parameters())

    def before_pass(self) -> None:
        """Nothing."""

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """As the class says."""
        logits = self.model(images).float()
        return F.cross_entropy(logits, self.labels[places].to(logits.device))
