"""Networks that draw images from latents, and the head that compares instances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    """Latents (N, Z) to images (N, C, H, W) in [0, 1]: a linear layer to a small canvas, then upsampled convolutions (CMI).

    The canvas is a quarter of the image's side, and less for images above 64 pixels, so that it has 16 pixels a side at most.

    Args:
        latent: Z.
        width: channels of all stages but the last, which has half of them.
        shape: (C, H, W); sides that the upsampling does not divide are generated larger and cropped.
    """

    def __init__(self, latent: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        doublings = max(2, math.ceil(math.log2(max(self.height, self.width) / 16)))
        scale = 2**doublings
        self.start = (width, -(-self.height // scale), -(-self.width // scale))
        half = max(width // 2, 1)
        self.project = nn.Linear(latent, math.prod(self.start))
        stages: list[nn.Module] = [nn.BatchNorm2d(width)]
        for stage in range(doublings):
            outputs = half if stage == doublings - 1 else width
            convolution = nn.Conv2d(width, outputs, 3, padding=1)
            stages.append(nn.Sequential(nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)))
        self.stages = nn.ModuleList(stages)
        self.paint = nn.Sequential(nn.Conv2d(half, channels, 3, padding=1), nn.Sigmoid())
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, latents: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of latents (N, Z)."""
        return self.finish(self.features(latents)[-1], len(self.stages))

    def features(self, latents: Tensor) -> Sequence[Tensor]:
        """What each stage gives, from the coarsest to the finest, (N, channels, height, width) each."""
        found = [self.project(latents).view(-1, *self.start)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found[1:]

    def finish(self, features: Tensor, stage: int) -> Tensor:
        """Images (N, C, H, W) of features that ``stage`` stages, 1 or more, have made."""
        for rest in list(self.stages)[stage:]:
            features = rest(features)
        images: Tensor = self.paint(features)
        return images[..., : self.height, : self.width].float()


class ProjectionHead(nn.Module):
    """Features (N, F) to unit vectors (N, D): linear, ReLU, linear, normalised (CMI).

    Args:
        features: F.
        hidden: units between the two layers, at most; CMI has F of them.
        projection: D.
    """

    def __init__(self, features: int, hidden: int, projection: int) -> None:
        super().__init__()
        self.size = features
        self.layers = nn.Sequential(nn.Linear(features, units := min(hidden, features)), nn.ReLU(), nn.Linear(units, projection))

    def forward(self, features: Tensor) -> Tensor:
        """Unit vectors (N, D)."""
        return F.normalize(self.layers(features).float(), dim=1)
