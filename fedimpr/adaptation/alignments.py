"""What brings the features of a target's images closer to those of the sources' impressions: the losses of this room as parts of a turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fedimpr.adaptation.adversarial import Discriminator, cdan, dann, reversal_strength
from fedimpr.adaptation.discrepancy import MultiKernelMMD, coral
from fedimpr.errors import ConfigError
from fedimpr.observation import Observation

Gap = Callable[[Observation, Observation, float], Tensor]
"""Takes source, target and the share of the turn that is done, in [0, 1)."""


class Alignment(Protocol):
    """A distance between two domains that a model can make small."""

    def bound(self, features: int, classes: int, generator: torch.Generator) -> tuple[Gap, nn.Module]:
        """The distance, and what learns beside the model (a discriminator, or nothing).

        Args:
            features: F.
            classes: K.
            generator: decides initial weights.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Coral:
    """Deep CORAL, see :func:`fedimpr.adaptation.coral`."""

    def bound(self, features: int, classes: int, generator: torch.Generator) -> tuple[Gap, nn.Module]:
        """As :class:`Alignment`."""
        return lambda source, target, _: coral(source.features, target.features), nn.Identity()


@dataclass(frozen=True, kw_only=True)
class MMD:
    """MMD with several kernels, see :class:`fedimpr.adaptation.MultiKernelMMD`.

    Attributes:
        multiples: of the scale, > 0; one kernel each.
        scale: ``"median"`` or ``"mean"``.
    """

    multiples: tuple[float, ...]
    scale: Literal["median", "mean"]

    def __post_init__(self) -> None:
        MultiKernelMMD(multiples=self.multiples, scale=self.scale)

    def bound(self, features: int, classes: int, generator: torch.Generator) -> tuple[Gap, nn.Module]:
        """As :class:`Alignment`."""
        distance = MultiKernelMMD(multiples=self.multiples, scale=self.scale)
        return lambda source, target, _: distance(source.features, target.features), nn.Identity()


@dataclass(frozen=True, kw_only=True)
class DANN:
    """A discriminator on features, see :func:`fedimpr.adaptation.dann`.

    Attributes:
        hidden: sizes of its hidden layers.
        gamma: how fast the reversal grows, > 0.
    """

    hidden: tuple[int, ...]
    gamma: float

    def __post_init__(self) -> None:
        _check(self.hidden, self.gamma)

    def bound(self, features: int, classes: int, generator: torch.Generator) -> tuple[Gap, nn.Module]:
        """As :class:`Alignment`."""
        discriminator = Discriminator(features, self.hidden, generator)

        def gap(source: Observation, target: Observation, progress: float) -> Tensor:
            return dann(discriminator, source, target, strength=reversal_strength(progress, self.gamma))

        return gap, discriminator


@dataclass(frozen=True, kw_only=True)
class CDAN:
    """A discriminator on features and predictions, see :func:`fedimpr.adaptation.cdan`.

    Attributes:
        hidden: sizes of its hidden layers.
        gamma: how fast the reversal grows, > 0.
        entropy_weighted: CDAN+E.
    """

    hidden: tuple[int, ...]
    gamma: float
    entropy_weighted: bool

    def __post_init__(self) -> None:
        _check(self.hidden, self.gamma)

    def bound(self, features: int, classes: int, generator: torch.Generator) -> tuple[Gap, nn.Module]:
        """As :class:`Alignment`."""
        discriminator = Discriminator(features * classes, self.hidden, generator)

        def gap(source: Observation, target: Observation, progress: float) -> Tensor:
            strength = reversal_strength(progress, self.gamma)
            return cdan(discriminator, source, target, strength=strength, entropy_weighted=self.entropy_weighted)

        return gap, discriminator


def _check(hidden: tuple[int, ...], gamma: float) -> None:
    if hidden and min(hidden) < 1:
        raise ConfigError("hidden", list(hidden), "whole numbers >= 1")
    if not gamma > 0:
        raise ConfigError("gamma", gamma, "a number > 0")
