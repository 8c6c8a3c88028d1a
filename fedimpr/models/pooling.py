"""Max-pooling that does not hold a CPU up."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaxPool2x2(nn.MaxPool2d):
    """``nn.MaxPool2d(2)``, the same values to the bit.

    PyTorch looks for the place of each maximum one pixel at a time, which on a CPU takes more than half of a LeNet-5's forward pass. Where
    nothing is differentiated nobody asks for the place, and two maxima of neighbours do: a tenth of the time.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H // 2, W // 2)."""
        if images.device.type != "cpu" or (images.requires_grad and torch.is_grad_enabled()):
            pooled: Tensor = super().forward(images)
            return pooled
        height, width = (side // 2 * 2 for side in images.shape[-2:])
        rows = torch.maximum(images[..., :height:2, :width], images[..., 1:height:2, :width])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])
