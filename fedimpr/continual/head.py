"""A head that grows: models of one architecture with more outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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
