"""A head that grows: models of one architecture with more outputs, and what they owe to how often each class was shown."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedimpr.errors import FedimprError


def grown(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with K classes in one with K' >= K: the first K outputs stay, the others are the fresh model's.

    Args:
        weights: a state dict.
        fresh: that of the same architecture with K' classes.

    Raises:
        FedimprError: they are not of one architecture, or the head would shrink.
    """
    if weights.keys() != fresh.keys():
        other = sorted(weights.keys() ^ fresh.keys())
        raise FedimprError("a head grows on the same architecture", stage="growing the head", value=other[:3])
    return {name: _grown(name, old, fresh[name]) for name, old in weights.items()}


def _grown(name: str, old: Tensor, fresh: Tensor) -> Tensor:
    if old.shape == fresh.shape:
        return old
    if old.dim() < 1 or old.shape[1:] != fresh.shape[1:] or len(old) > len(fresh):
        raise FedimprError(f"'{name}' cannot grow", stage="growing the head", value=(tuple(old.shape), tuple(fresh.shape)))
    return torch.cat([old, fresh[len(old) :].to(old.device)])


@torch.no_grad()
def adjust(head: nn.Linear, often: Tensor) -> None:
    """Take the log of how often each class was shown off its logit, in place: what was shown more often is named more often.

    Post-hoc logit adjustment: Menon, Jayasumana, Rawat, Jain, Veit, Kumar, *Long-tail Learning via Logit Adjustment*, ICLR 2021 (arXiv
    2007.07314), section 4.1, with temperature 1.

    Args:
        head: the layer that makes the logits, with a bias.
        often: (K,), of each output, > 0, in any unit.

    Raises:
        FedimprError: the layer has no bias, or another number of outputs.
    """
    if head.bias is None or head.bias.shape != often.shape:
        found = None if head.bias is None else len(head.bias)
        raise FedimprError(f"the head needs a bias of {len(often)} outputs", stage="adjusting the head", value=found)
    head.bias.sub_(often.log().to(head.bias.device))
