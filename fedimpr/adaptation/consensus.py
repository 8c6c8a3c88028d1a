"""KD3A's consensus of source models on target images.

Feng, You, Chen, Zhang, Zhu, Wu, Wu, Chen: *KD3A: Unsupervised Multi-Source Decentralized Domain Adaptation via Knowledge Distillation*,
ICML 2021 (arXiv 2011.09757).

The target learns from what several sources agree on, and a source counts by what the consensus gains from it.

Differences: this is the text's method. The released code takes the consensus class itself as a one-hot target, of weight 1 or, where nobody
is confident, 0; it lets each source vote with its largest probability only, and takes Shapley values for the focus. Here a source that the
consensus loses by has weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedimpr.errors import ConfigError, FedimprError
from fedimpr.synthesis.base import require


class Consensus(NamedTuple):
    """What M sources agree on for N images.

    Attributes:
        targets: (N, K), the mean prediction of the supporters; of all sources where there is none.
        weights: (N,), the number of supporters; ``undecided`` where there is none.
        supporters: (M, N), bool: confident, and for the consensus class.
    """

    targets: Tensor
    weights: Tensor
    supporters: Tensor


@dataclass(frozen=True, kw_only=True)
class KnowledgeVote:
    """The vote of the sources on each image.

    A source whose largest probability is above the gate votes with its prediction. The largest of the votes' sum is the consensus class,
    and the voters that answer it are its supporters.

    Attributes:
        gate: in [0, 1). The paper raises it during training: 0.9 to 0.95 for digits, 0.8 to 0.95 for DomainNet.
        undecided: the weight >= 0 of an image without supporters; 0.001 in the paper.
    """

    gate: float
    undecided: float

    def __post_init__(self) -> None:
        if not 0 <= self.gate < 1:
            raise ConfigError("gate", self.gate, "a number in [0, 1)")
        require(self, at_least_zero=("undecided",))

    def __call__(self, probabilities: Tensor) -> Consensus:
        """The consensus of predictions (M, N, K), each a distribution over K.

        Raises:
            FedimprError: they have another shape.
        """
        _check(probabilities)
        largest, classes = probabilities.max(2)
        votes = largest > self.gate
        consensus = (probabilities * votes[..., None]).sum(0).argmax(1)
        supporters = votes & (classes == consensus)
        count = supporters.sum(0)
        # The class with the largest sum may be nobody's first choice.
        counted = torch.where(count > 0, supporters, torch.ones_like(supporters)).to(probabilities.dtype)
        targets = (probabilities * counted[..., None]).sum(0) / counted.sum(0)[:, None]
        weights = torch.where(count > 0, count.to(probabilities.dtype), torch.full_like(largest[0], self.undecided))
        return Consensus(targets, weights, supporters)

    def quality(self, probabilities: Tensor) -> Tensor:
        """The sum over images of the consensus' weight times its largest probability; a scalar >= 0, of predictions (M, N, K)."""
        consensus = self(probabilities)
        return (consensus.weights * consensus.targets.amax(1)).sum()

    def focus(self, probabilities: Tensor) -> Tensor:
        """What the quality of the consensus loses without each source; (M,), of predictions (M, N, K).

        Below 0 for a source that disturbs the others. It is a sum over images: that of a data set is the sum of its batches'.
        """
        whole = self.quality(probabilities)
        others = [torch.cat([probabilities[:m], probabilities[m + 1 :]]) for m in range(len(probabilities))]
        return torch.stack([whole - (self.quality(rest) if len(rest) else 0) for rest in others])


def source_weights(focus: Tensor, examples: Tensor) -> Tensor:
    """(M,), sum 1: each source's focus, at least 0, times its number of examples. Where no source has any, the examples alone.

    Args:
        focus: (M,), see :meth:`KnowledgeVote.focus`.
        examples: (M,), > 0.

    Raises:
        FedimprError: the shapes are unlike, or a number is out of range.
    """
    stage = "consensus focus"
    if focus.dim() != 1 or focus.shape != examples.shape or not len(focus):
        raise FedimprError(
            "focus and examples must have one number a source", stage=stage, value=(tuple(focus.shape), tuple(examples.shape))
        )
    if not bool(focus.isfinite().all()) or not bool((examples > 0).all()):
        remedy = "Leave out sources without examples."
        raise FedimprError("focus must be finite and examples > 0", stage=stage, value=(focus.tolist(), examples.tolist()), remedy=remedy)
    raw = focus.clamp_min(0) * examples
    raw = torch.where(raw.sum() > 0, raw, examples.to(raw.dtype))
    return raw / raw.sum()


def _check(probabilities: Tensor) -> None:
    if probabilities.dim() != 3 or 0 in probabilities.shape:
        raise FedimprError("predictions must be (M, N, K), none of them 0", stage="knowledge vote", value=tuple(probabilities.shape))
