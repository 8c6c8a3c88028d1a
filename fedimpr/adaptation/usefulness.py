"""How useful each source is for a target, judged by the target's images without labels.

Own definition. Two things are asked of a source model, and its usefulness is their product:

* Information: is it sure of each image, and are its answers of all classes? The entropy of its mean answer minus the mean entropy of its
  answers, which is what SHOT maximises (Liang et al., ICML 2020). It falls with the distance of the domains, and with wrong labels.
* Agreement: does it answer as another source does more often than their shares of the classes would have it? That exposes a source that
  learnt another order of the labels: it is as sure as any, but contradicts all others.

KD3A's consensus focus (Feng et al., ICML 2021) was tried for this and left: where few sources know the target's domain, a sure source with
permuted labels had the largest focus of all, as being contradicted by those who know little takes nothing from it.

Of two sources that contradict each other none is known to be right: this takes three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedimpr.adaptation.batch_norm import reestimate, restore, statistics_of
from fedimpr.adaptation.information import information_loss
from fedimpr.adaptation.learning import predictions, whole
from fedimpr.errors import FedimprError


class Survey(NamedTuple):
    """What M source models are to a target.

    Attributes:
        information: (M,), in nats, in [0, ln K].
        agreement: (M, M), symmetric: the mean over images of the product of two answers, minus the product of the mean answers; in
            [-1, 1], 0 for answers that have nothing to do with each other.
        statistics: for each source model its batch-norm statistics on the target's images, by name; empty for a model without batch norm.
    """

    information: Tensor
    agreement: Tensor
    statistics: list[dict[str, Tensor]]


def survey(sources: Sequence[nn.Module], pixels: Tensor, *, batch_size: int) -> Survey:
    """Look at all source models with a target's images; the models are left as they are.

    Args:
        sources: M models.
        pixels: uint8, (N, C, H, W), N >= 2.
        batch_size: of the passes that take batch-norm statistics.
    """
    answers = torch.stack([predictions(source, pixels) for source in sources]).double()
    information = torch.stack([-information_loss(own.clamp_min(1e-30).log()) for own in answers])
    mean = answers.mean(1)
    together = torch.einsum("mnk,lnk->ml", answers, answers) / answers.shape[1]
    return Survey(information, together - mean @ mean.T, [target_statistics(source, pixels, batch_size) for source in sources])


def usefulness(information: Tensor, agreement: Tensor) -> Tensor:
    """(M,), >= 0, sum 1: each source's information times its agreement with others, where that is positive.

    Where nobody agrees with anybody, or there is one source only, information alone; where there is none, all alike.

    Args:
        information: (M,), see :class:`Survey`.
        agreement: (M, M), likewise.

    Raises:
        FedimprError: the shapes are others, or a number is not finite.
    """
    stage, count = "usefulness of the sources", len(information)
    if not count or agreement.shape != (count, count):
        raise FedimprError("agreement must be (M, M) for M sources", stage=stage, value=(tuple(information.shape), tuple(agreement.shape)))
    if not bool(information.isfinite().all() & agreement.isfinite().all()):
        raise FedimprError("information and agreement must be finite", stage=stage, remedy="Look at the source models' weights.")
    others = agreement.clamp_min(0).fill_diagonal_(0).sum(1)
    for raw in (information.clamp_min(0) * others, information.clamp_min(0)):
        if float(raw.sum()) > 0:
            return raw / raw.sum()
    return torch.full_like(information, 1 / count)


def target_statistics(source: nn.Module, pixels: Tensor, batch_size: int) -> dict[str, Tensor]:
    """The batch-norm statistics of a model on images uint8 (N, C, H, W), N >= 2, by name; none without batch norm. It is left as it is."""
    if not statistics_of(source):
        return {}
    parts = whole(torch.arange(len(pixels)), batch_size)
    before = reestimate(source, (pixels[part].float() / 255 for part in parts), momentum=None)
    after = statistics_of(source)
    restore(source, before)
    return after
