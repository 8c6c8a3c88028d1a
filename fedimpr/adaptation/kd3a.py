"""Knowledge distillation from the consensus of the source models.

Feng, You, Chen, Zhang, Zhu, Wu, Wu, Chen: *KD3A: Unsupervised Multi-Source Decentralized Domain Adaptation via Knowledge Distillation*,
ICML 2021 (arXiv 2011.09757); see :mod:`fedimpr.adaptation.consensus` for the vote and what differs in it.

Differences: the sources are trained before and not in turn with the target, so they vote once, on the images as they are, while the gate
rises over the turn. The target's model is not averaged with the sources' after each pass, and there is no discrepancy of batch-norm
statistics in the loss. Sources are not weighed by their focus: the survey that all methods share leaves out those of no use, see
:mod:`fedimpr.adaptation.usefulness`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr.adaptation.consensus import KnowledgeVote
from fedimpr.adaptation.learning import Given, Need, predictions


@dataclass(frozen=True, kw_only=True)
class KD3A:
    """The cross-entropy with the consensus of the sources, each image weighted by its supporters.

    Attributes:
        gate: at the start, in [0, 1).
        gate_at_last: at the end, in [0, 1); 0.9 to 0.95 for digits, 0.8 to 0.95 for photographs in the paper.
        undecided: the weight >= 0 of an image that nobody is sure of; 0.001 in the paper.
    """

    gate: float
    gate_at_last: float
    undecided: float

    def __post_init__(self) -> None:
        for gate in (self.gate, self.gate_at_last):
            KnowledgeVote(gate=gate, undecided=self.undecided)

    @property
    def needs(self) -> frozenset[Need]:
        """The source models."""
        return frozenset({"sources"})

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> _AtWork:
        """As :class:`~fedimpr.adaptation.learning.Method`."""
        return _AtWork(self, model, torch.stack([predictions(source, pixels) for source in given.sources]))


class _AtWork:
    def __init__(self, method: KD3A, model: nn.Module, answers: Tensor) -> None:
        self.method, self.model, self.answers = method, model, answers

    def parameters(self) -> list[nn.Parameter]:
        """All of the model."""
        return list(self.model.parameters())

    def before_pass(self) -> None:
        """Nothing."""

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """As the class says."""
        gate = self.method.gate + progress * (self.method.gate_at_last - self.method.gate)
        consensus = KnowledgeVote(gate=gate, undecided=self.method.undecided)(self.answers[:, places])
        logits = self.model(images).float()
        losses = F.cross_entropy(logits, consensus.targets.to(logits.device), reduction="none")
        return (consensus.weights.to(logits.device) * losses).mean()
