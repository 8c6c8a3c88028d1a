"""Networks that draw images from latents, and the head that compares instances."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    """Latents (N, Z) to images (N, C, H, W) in [0, 1]: a linear layer to a quarter of the size, then two upsampled convolutions (CMI).

    Args:
        latent: Z.
        width: channels of the first two stages; the last has half of them.
        shape: (C, H, W); sides that 4 does not divide are generated larger and cropped.
    """

    def __init__(self, latent: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.start = (width, -(-self.height // 4), -(-self.width // 4))
        self.project = nn.Linear(latent, self.start[0] * self.start[1] * self.start[2])
        half = max(width // 2, 1)
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.LeakyReLU(0.2),
            nn.Conv2d(half, channels, 3, padding=1),
            nn.Sigmoid(),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, latents: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of latents (N, Z)."""
        images: Tensor = self.body(self.project(latents).view(-1, *self.start))
        return images[..., : self.height, : self.width]


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
        return F.normalize(self.layers(features), dim=1)
