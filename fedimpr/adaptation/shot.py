"""Source hypothesis transfer.

Liang, Hu, Feng: *Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain Adaptation*, ICML 2020
(arXiv 2002.08546); see :mod:`fedimpr.adaptation.information` for its two losses and what differs in them.

Differences: the source model was trained without label smoothing and without weight normalisation of its final layer, and the network has
no bottleneck of its own. Learning rates of all layers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr.adaptation.information import information_loss, pseudo_labels
from fedimpr.adaptation.learning import Given, Need
from fedimpr.devices import device_of
from fedimpr.errors import ConfigError
from fedimpr.models import final_layer
from fedimpr.observation import frozen, observe
from fedimpr.synthesis.base import require

AT_ONCE = 500  # images in a pass that labels


@dataclass(frozen=True, kw_only=True)
class Shot:
    """``information * information_loss + pseudo * CE(pseudo-labels)``; the final layer stays as it is.

    Attributes:
        information: >= 0; 1 in the paper.
        pseudo: >= 0; 0.1 for digits and 0.3 for photographs in the released code.
        at_least: a class that is answered for fewer images is no pseudo-label, >= 1.
    """

    information: float
    pseudo: float
    at_least: int

    def __post_init__(self) -> None:
        require(self, at_least_zero=("information", "pseudo"))
        if self.at_least < 1:
            raise ConfigError("at_least", self.at_least, "an integer >= 1")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> _AtWork:
        """As :class:`~fedimpr.adaptation.learning.Method`."""
        return _AtWork(self, model, pixels)


class _AtWork:
    def __init__(self, method: Shot, model: nn.Module, pixels: Tensor) -> None:
        self.method, self.model, self.pixels = method, model, pixels
        self.labels = torch.zeros(len(pixels), dtype=torch.int64)

    def parameters(self) -> list[nn.Parameter]:
        """All but the final layer's."""
        kept = {id(parameter) for parameter in final_layer(self.model).parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in kept]

    def before_pass(self) -> None:
        """Label all images anew."""
        device = device_of(self.model)
        with torch.no_grad(), frozen(self.model):
            seen = [observe(self.model, part.to(device).float() / 255, features="penultimate") for part in self.pixels.split(AT_ONCE)]
        features, logits = torch.cat([part.features for part in seen]), torch.cat([part.logits for part in seen])
        # A client may hold fewer images of each class than at_least: then its most frequent answers have to do.
        most = int(logits.argmax(1).bincount().max())
        self.labels = pseudo_labels(features, logits, at_least=min(self.method.at_least, most)).cpu()

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """As the class says."""
        logits = self.model(images).float()
        wanted = self.labels[places].to(logits.device)
        return self.method.information * information_loss(logits) + self.method.pseudo * F.cross_entropy(logits, wanted)
