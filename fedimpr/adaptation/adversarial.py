"""Features that a discriminator cannot tell the domains by.

DANN: Ganin, Ustinova, Ajakan, Germain, Larochelle, Laviolette, Marchand, Lempitsky: *Domain-Adversarial Training of Neural Networks*,
JMLR 17, 2016 (arXiv 1505.07818). CDAN: Long, Cao, Wang, Jordan: *Conditional Adversarial Domain Adaptation*, NeurIPS 2018 (arXiv
1705.10667).

One loss serves both sides: the discriminator goes down it, and what makes the features goes up, because their gradient is reversed.

Differences: as in CDAN's released code, no gradient flows into the predictions of its multilinear map, and the entropy weights of a domain
are divided by their mean; unlike there, no gradient flows into these weights. The map is not randomised, whatever its size, and the
discriminator has no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.adaptation.shapes import require_pair, require_rows
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.observation import Observation


def reversal_strength(progress: float, gamma: float) -> float:
    """``2 / (1 + exp(-gamma * progress)) - 1``: from 0 towards 1 over a training (DANN, with gamma 10).

    Args:
        progress: the share of the training that is done, in [0, 1].
        gamma: how fast it grows, > 0.

    Raises:
        FedimprError: the progress is out of range.
        ConfigError: gamma is.
    """
    if not 0 <= progress <= 1:
        raise FedimprError("the progress of a training is a number in [0, 1]", stage="gradient reversal", value=progress)
    if not gamma > 0:
        raise ConfigError("gamma", gamma, "a number > 0")
    return math.tanh(gamma * progress / 2)  # the same number


def reverse(features: Tensor, strength: float) -> Tensor:
    """The features as they are, whose gradient comes back times ``-strength``."""
    reversed_: Tensor = _Reversal.apply(features, strength)  # type: ignore[no-untyped-call]
    return reversed_


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


class Discriminator(nn.Module):
    """Tells source from target: linear layers with ReLU between them.

    Args:
        inputs: D, the size of what it looks at: F for :func:`dann`, F * K for :func:`cdan`.
        hidden: the sizes of the layers between, >= 1; may be empty. DANN has (100,) for digits and (1024, 1024) for photographs.
        generator: decides the initial weights; the global random state is left alone.

    Raises:
        ConfigError: a size is below 1.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        if min((inputs, *hidden)) < 1:
            raise ConfigError("hidden", list(hidden), "whole numbers >= 1")
        self.inputs = inputs
        with seeds.isolated(seeds.draw_seed(generator)):
            steps = [layer for size in pairwise((inputs, *hidden)) for layer in (nn.Linear(*size), nn.ReLU())]
            self.layers = nn.Sequential(*steps, nn.Linear((inputs, *hidden)[-1], 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N,) from (N, D): the logit of "source".

        Raises:
            FedimprError: the inputs have another shape.
        """
        require_rows(inputs, "what the discriminator looks at", "domain discriminator", columns=self.inputs)
        logits: Tensor = self.layers(inputs).squeeze(1).float()
        return logits


def dann(discriminator: nn.Module, source: Observation, target: Observation, *, strength: float) -> Tensor:
    """``-mean log D(source) - mean log(1 - D(target))``, D the probability of "source"; a scalar >= 0.

    Args:
        discriminator: maps (N, F) to logits (N,).
        source: with features (N, F).
        target: with features (N', F).
        strength: of the reversal, see :func:`reverse`.

    Raises:
        FedimprError: the features have other shapes.
    """
    require_pair(source.features, target.features, "features", "DANN")
    told = discriminator(reverse(torch.cat([source.features, target.features]), strength))
    of_source, of_target = told[: len(source.features)], told[len(source.features) :]
    return F.softplus(-of_source).mean() + F.softplus(of_target).mean()


def cdan(discriminator: nn.Module, source: Observation, target: Observation, *, strength: float, entropy_weighted: bool) -> Tensor:
    """As :func:`dann`, of the :func:`multilinear` map of features and predictions in place of the features.

    Args:
        discriminator: maps (N, K * F) to logits (N,).
        source: with features (N, F) and logits (N, K).
        target: with features (N', F) and logits (N', K).
        strength: of the reversal, see :func:`reverse`.
        entropy_weighted: whether either mean is weighted by :func:`certainty` (CDAN+E).

    Raises:
        FedimprError: features or logits have other shapes.
    """
    require_pair(source.features, target.features, "features", "CDAN")
    require_pair(source.logits, target.logits, "logits", "CDAN")
    mapped = torch.cat([multilinear(seen.features, seen.logits.detach()) for seen in (source, target)])
    told = discriminator(reverse(mapped, strength))
    losses = F.softplus(-told[: len(source.features)]), F.softplus(told[len(source.features) :])
    if not entropy_weighted:
        return losses[0].mean() + losses[1].mean()
    weights = [certainty(seen.logits.detach()) for seen in (source, target)]
    return sum(((w * loss).sum() / w.sum() for w, loss in zip(weights, losses, strict=True)), start=losses[0].new_zeros(()))


def multilinear(features: Tensor, logits: Tensor) -> Tensor:
    """The outer product of each image's softmax and features, flattened: (N, K * F), class by class.

    Args:
        features: (N, F).
        logits: (N, K).

    Raises:
        FedimprError: the shapes are others, or of unlike N.
    """
    require_rows(features, "features", "CDAN")
    require_rows(logits, "logits", "CDAN")
    if len(features) != len(logits):
        raise FedimprError("features and logits must be of the same images", stage="CDAN", value=(len(features), len(logits)))
    return (logits.softmax(1)[:, :, None] * features[:, None, :]).flatten(1)


def certainty(logits: Tensor) -> Tensor:
    """``1 + exp(-H)``, H the entropy of the softmax in nats: (N,) in (1, 2], from logits (N, K) (CDAN+E)."""
    return 1 + torch.exp((logits.softmax(1) * logits.log_softmax(1)).sum(1))
