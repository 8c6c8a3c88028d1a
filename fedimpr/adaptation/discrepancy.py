"""Distances between the features of two domains; training makes them small.

CORAL: Sun, Saenko: *Deep CORAL: Correlation Alignment for Deep Domain Adaptation*, ECCV Workshops 2016 (arXiv 1607.01719).

MMD: Gretton, Borgwardt, Rasch, Schölkopf, Smola: *A Kernel Two-Sample Test*, JMLR 13, 2012. Several kernels and the median heuristic: Long,
Cao, Wang, Jordan: *Learning Transferable Features with Deep Adaptation Networks*, ICML 2015 (arXiv 1502.02791).

Differences: MMD is estimated by Gretton's biased statistic, a mean over all pairs, those of an image with itself included. It is >= 0 and
takes domains of unlike sizes. The paper of 2015 has the linear-time statistic, and learns how much each kernel counts; here all kernels
count alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedimpr.adaptation.shapes import require_pair
from fedimpr.errors import ConfigError

TINY = 1e-12


def coral(source: Tensor, target: Tensor) -> Tensor:
    """``|C_source - C_target|_F^2 / (4 D^2)``, C the unbiased covariance of the features; a scalar >= 0.

    Args:
        source: (N, D), N >= 2.
        target: (N', D), N' >= 2.

    Raises:
        FedimprError: the shapes are others.
    """
    require_pair(source, target, "features", "CORAL", least=2)
    with torch.autocast(source.device.type, enabled=False):  # a difference of sums: it needs all its digits
        gap = torch.cov(source.T) - torch.cov(target.T)
    return gap.square().sum() / (4 * source.shape[1] ** 2)


def mmd(source: Tensor, target: Tensor, bandwidths: Tensor) -> Tensor:
    """The squared maximum mean discrepancy, estimated by the biased statistic; a scalar >= 0.

    ``mean k(s, s') + mean k(t, t') - 2 mean k(s, t)`` over all pairs, with ``k(x, y)`` the mean over bandwidths b of
    ``exp(-|x - y|^2 / b)``.

    Args:
        source: (N, D).
        target: (N', D).
        bandwidths: (U,), > 0, in units of a squared distance.

    Raises:
        FedimprError: the features have other shapes.
    """
    require_pair(source, target, "features", "MMD")
    squares = _squared_distances(torch.cat([source, target]))
    kernel = torch.stack([torch.exp(-squares / bandwidth) for bandwidth in bandwidths]).mean(0)
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


@dataclass(frozen=True, kw_only=True)
class MultiKernelMMD:
    """The discrepancy :func:`mmd` with bandwidths that follow the features' own scale.

    The scale is taken over the squared distances between different images of both domains together. No gradient flows through it.

    Attributes:
        multiples: of the scale, > 0; one kernel each. A common choice is 1/4, 1/2, 1, 2 and 4 times the mean.
        scale: ``"median"`` (of an even number the lower of the two in the middle) or ``"mean"``.
    """

    multiples: Sequence[float]
    scale: Literal["median", "mean"]

    def __post_init__(self) -> None:
        if not self.multiples or min(self.multiples) <= 0:
            raise ConfigError("multiples", self.multiples, "one number > 0 or more")
        if self.scale not in ("median", "mean"):
            raise ConfigError("scale", self.scale, "'median' or 'mean'")

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """As :func:`mmd`, of features (N, D) and (N', D)."""
        return mmd(source, target, self.bandwidths(source, target))

    def bandwidths(self, source: Tensor, target: Tensor) -> Tensor:
        """(U,), > 0: one for each multiple; of features (N, D) and (N', D).

        Raises:
            FedimprError: the features have other shapes.
        """
        require_pair(source, target, "features", "MMD")
        joined = torch.cat([source, target]).detach()
        above = torch.ones(len(joined), len(joined), dtype=torch.bool, device=joined.device).triu(1)
        squares = _squared_distances(joined)[above]
        scale = squares.median() if self.scale == "median" else squares.mean()
        return scale.clamp_min(TINY) * torch.tensor(list(self.multiples), dtype=scale.dtype, device=scale.device)


def _squared_distances(rows: Tensor) -> Tensor:
    """(N, N) of rows (N, D). Not by the products of the rows: their differences would lose the small distances."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
