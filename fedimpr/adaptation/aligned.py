"""Impressions as the labelled source of a domain adaptation that was made for labelled source images.

Nayak, Mopuri, Jain, Chakraborty: *Mining Data Impressions from Deep Models as Substitute for the Unavailable Training Data*, TPAMI 2021
(arXiv 2101.06069), uses data impressions so. The alignments come with their own papers, see :mod:`fedimpr.adaptation.alignments`.

Differences: impressions are those of several source models, and carry soft targets. The two domains pass the network one after the other,
each normalised by its own batch, and the running statistics that remain are the target's. SHOT's information loss on the target's images
comes on top (weight 0 leaves it out): impressions alone are a poor likeness of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr.adaptation.alignments import Alignment
from fedimpr.adaptation.batch_norm import unremembered
from fedimpr.adaptation.information import information_loss
from fedimpr.adaptation.learning import Given, Need, SourceImpressions
from fedimpr.devices import device_of
from fedimpr.models import final_layer
from fedimpr.observation import Observation, observe
from fedimpr.synthesis.base import require
from fedimpr.views import Augmentation


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """``CE(impressions) + alignment_weight * gap + information * information_loss(target)``.

    Attributes:
        alignment: the gap between impressions and target.
        alignment_weight: >= 0.
        information: weight of the information loss, >= 0.
        replayed: augmentation of the impressions.
    """

    alignment: Alignment
    alignment_weight: float
    information: float
    replayed: Augmentation

    def __post_init__(self) -> None:
        require(self, at_least_zero=("alignment_weight", "information"))

    @property
    def needs(self) -> frozenset[Need]:
        """Impressions."""
        return frozenset({"impressions"})

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> _AtWork:
        """As :class:`~fedimpr.adaptation.learning.Method`."""
        return _AtWork(self, model, given, generator)


class _AtWork:
    def __init__(self, method: Aligned, model: nn.Module, given: Given, generator: torch.Generator) -> None:
        self.method, self.model = method, model
        self.replay = Replay(model, given, method.replayed, generator)
        final = final_layer(model)
        self.gap, self.beside = method.alignment.bound(final.in_features, final.out_features, generator)
        self.beside.to(device_of(model))

    def parameters(self) -> list[nn.Parameter]:
        """All of the model, and the discriminator if there is one."""
        return [*self.model.parameters(), *self.beside.parameters()]

    def before_pass(self) -> None:
        """Nothing."""

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """As the class says."""
        source, loss = self.replay(len(images))
        target = observe(self.model, images, features="penultimate")
        loss = loss + self.method.alignment_weight * self.gap(source, target, progress)
        return loss + self.method.information * information_loss(target.logits)


class Replay:
    """Impressions that pass a model in training mode, and what they cost.

    Args:
        model: its batch-norm layers normalise impressions by their own batch and do not remember them.
        given: with impressions.
        views: augmentation of the impressions.
        generator: the source of all randomness.
    """

    def __init__(self, model: nn.Module, given: Given, views: Augmentation, generator: torch.Generator) -> None:
        assert given.impressions is not None  # it was asked for
        self.impressions: SourceImpressions = given.impressions
        self.model, self.weights, self.views, self.generator = model, given.weights, views, generator

    def __call__(self, count: int) -> tuple[Observation, Tensor]:
        """What ``count`` impressions show at the last hidden layer, and the cross-entropy with their targets."""
        images, targets = (part.to(device_of(self.model)) for part in self.impressions.sample(count, self.weights, self.generator))
        with unremembered(self.model):
            seen = observe(self.model, self.views(images, self.generator), features="penultimate")
        return seen, F.cross_entropy(seen.logits, targets)
