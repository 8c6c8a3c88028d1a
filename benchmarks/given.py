"""Images that were not mined: the bounds of ``methods.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedimpr.devices import device_of
from fedimpr.impressions import Impressions
from fedimpr.synthesis import Progress, silent
from fedimpr.synthesis.base import finished


@dataclass
class Given:
    """Images that were not mined from the teacher: real ones, for the upper bound, or noise, for the lower.

    Attributes:
        real: whether ``images`` is to be filled with the training images before it is used.
        images: (N, C, H, W) in [0, 1]; ``None`` for noise.
    """

    real: bool
    images: Tensor | None = None

    def synthesize(
        self,
        teacher: nn.Module,
        count: int,
        generator: torch.Generator,
        *,
        shape: tuple[int, int, int],
        student: nn.Module | None = None,
        progress: Progress = silent,
    ) -> Impressions:
        """The first ``count`` images, or as many of noise."""
        images = torch.rand(count, *shape, generator=generator) if self.images is None else self.images[:count]
        with torch.no_grad():
            decided = torch.cat([teacher(part.to(device_of(teacher))).argmax(1) for part in images.split(500)])
        return finished(teacher, images.to(device_of(teacher)), decided, 20.0, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
