"""Holding a share of every class out."""

from __future__ import annotations

import torch
from torch import Tensor

from fedimpr import seeds
from fedimpr.errors import ConfigError


def hold_out(labels: Tensor, share: float, seed: int, *, key: str) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), each ascending; every class gives ``share`` of its images, and at least one of two or more.

    Args:
        labels: (N,).
        share: in (0, 1).
        seed: decides which images are held out.
        key: the config key that ``share`` stands in, for the error; it also keeps two splits of one seed apart.

    Raises:
        ConfigError: the share is out of range.
    """
    if not 0 < share < 1:
        raise ConfigError(key, share, "a share in (0, 1)")
    generator = seeds.generator(seed, key)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
