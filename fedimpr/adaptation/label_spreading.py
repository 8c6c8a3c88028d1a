"""Learning what the source models answer for the target's images, after it has spread among these, beside impressions.

Own method, of three parts. Zhou, Bousquet, Lal, Weston, Schölkopf: *Learning with Local and Global Consistency*, NeurIPS 2003, spreads
the answers; see :mod:`fedimpr.adaptation.spreading`. Schneider, Rusak, Eck, Bringmann, Brendel, Bethge: *Improving Robustness against
Common Corruptions by Covariate Shift Adaptation*, NeurIPS 2020 (arXiv 2006.16971), mixes statistics of source and target. Impressions are
replayed as in :mod:`fedimpr.adaptation.aligned`.

Each source model looks at all images, with batch-norm statistics between its own and the target's. Its logits are levelled, as they are
large, wrong and of a few classes far from its domain, and their mean by usefulness is the vote. It spreads along the features of all
sources, and is what the model learns, on views of which half are strong changes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr.adaptation.aligned import Replay
from fedimpr.adaptation.batch_norm import restore, statistics_of
from fedimpr.adaptation.learning import Given, Need
from fedimpr.adaptation.spreading import Spreading, evened, levelled
from fedimpr.adaptation.usefulness import target_statistics
from fedimpr.devices import device_of
from fedimpr.errors import ConfigError
from fedimpr.observation import observe
from fedimpr.synthesis.base import require
from fedimpr.views import Augmentation


@dataclass(frozen=True, kw_only=True)
class LabelSpreading:
    """``CE(target, spread vote ** sharpness, normalised) + replay * CE(impressions)``.

    Attributes:
        share: of the target in the batch-norm statistics that a source looks with, in [0, 1].
        batch_size: images in a pass that takes the target's statistics, >= 2; the more the better.
        temperature: of the softmax of the mean of levelled logits, > 0; their mean length is one at most.
        spreading: of the vote among the images.
        sharpness: > 0; 1 learns the vote as it has spread, more its likeliest class.
        replay: weight of the impressions, >= 0; at 0 none are needed.
        strong: changes half of the images of a step, on top of the turn's views.
        replayed: augmentation of the impressions.
    """

    share: float
    batch_size: int
    temperature: float
    spreading: Spreading
    sharpness: float
    replay: float
    strong: Augmentation
    replayed: Augmentation

    def __post_init__(self) -> None:
        require(self, above_zero=("temperature", "sharpness"), at_least_zero=("replay",))
        if not 0 <= self.share <= 1:
            raise ConfigError("share", self.share, "a number in [0, 1]")
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2")

    @property
    def needs(self) -> frozenset[Need]:
        """The source models, and impressions where they have a weight."""
        return frozenset({"sources", "impressions"}) if self.replay > 0 else frozenset({"sources"})

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> _AtWork:
        """As :class:`~fedimpr.adaptation.learning.Method`."""
        return _AtWork(self, model, pixels, given, generator)

    def labels(self, sources: Sequence[nn.Module], weights: Tensor, pixels: Tensor) -> Tensor:
        """What a turn learns: (N, K), rows sum to one; the sources are left as they are.

        Args:
            sources: M models in eval mode.
            weights: (M,), how useful they are, >= 0, sum 1.
            pixels: uint8, (N, C, H, W), N >= 2.
        """
        vote, features = torch.zeros(()), list[Tensor]()
        for source, weight in zip(sources, weights.tolist(), strict=True):
            logits, shown = self._look(source, pixels)
            vote = vote + weight * levelled(logits)
            # The mean is what all images of a domain have in common.
            features.append(weight**0.5 * F.normalize(shown - shown.mean(0), dim=1))
        answers = evened((vote / self.temperature).softmax(1))
        sharp = evened(self.spreading(torch.cat(features, 1), answers)) ** self.sharpness
        return sharp / sharp.sum(1, keepdim=True)

    @torch.no_grad()
    def _look(self, source: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (N, K) and the last hidden layer (N, F) of a source with mixed statistics, on the CPU."""
        model, device = copy.deepcopy(source), device_of(source)
        after = target_statistics(source, pixels, self.batch_size)
        restore(model, {key: _between(held, after[key], self.share) for key, held in statistics_of(source).items()})
        seen = [observe(model, part.to(device).float() / 255, features="penultimate") for part in pixels.split(self.batch_size)]
        return torch.cat([one.logits.float().cpu() for one in seen]), torch.cat([one.features.float().cpu() for one in seen])


class _AtWork:
    def __init__(self, method: LabelSpreading, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> None:
        self.method, self.model, self.generator = method, model, generator
        self.labels = method.labels(given.sources, given.weights, pixels)
        self.replay = Replay(model, given, method.replayed, generator) if method.replay > 0 else None

    def parameters(self) -> list[nn.Parameter]:
        """All of the model."""
        return list(self.model.parameters())

    def before_pass(self) -> None:
        """Nothing."""

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """As the class says."""
        half = len(images) // 2
        views = torch.cat([images[:half], self.method.strong(images[half:], self.generator)])
        logits = self.model(views).float()
        loss = F.cross_entropy(logits, self.labels[places].to(logits.device))
        return loss if self.replay is None else loss + self.method.replay * self.replay(len(images))[1]


def _between(source: Tensor, target: Tensor, share: float) -> Tensor:
    """Of whole numbers, which count batches, the source's."""
    return torch.lerp(source, target, share) if source.is_floating_point() else source
