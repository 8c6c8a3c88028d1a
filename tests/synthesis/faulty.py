"""A teacher that fails at a given time, and views that move nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedimpr.views import Views
from tests.makers import small_model


class Faulty(nn.Module):
    """The small model, but its ``first`` to ``last`` answers, counted from 1, are not a number."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.model, self.first, self.last, self.calls = small_model(), first, last, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.model(images) * (torch.nan if self.first <= self.calls <= self.last else 1)


def still() -> Views:
    """Views that move nothing."""
    return Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)
