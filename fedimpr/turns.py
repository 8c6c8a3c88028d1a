"""Images in quarter turns, each of which is a class of its own: a model that is to tell them apart must know what its classes look like.

A model of two classes tells them by whatever differs, and impressions of it show that and no more. A model that also tells which way up an
image is knows a class's strokes and where they are, so that its impressions show them, too. What is learnt is self-supervised label
augmentation: Lee, Hwang, Shin, *Self-supervised Label Augmentation via Input Transformations*, ICML 2020 (arXiv 1910.05872), with the
quarter turns of Gidaris, Singh, Komodakis, ICLR 2018 (arXiv 1803.07728); the answer about an image is the mean over its four turns. In
class-incremental learning it is part of PASS: Zhu, Zhang, Wang, Yin, Liu, CVPR 2021.

Class k turned by q quarters is output ``4 k + q`` of the network; ``q = 0`` is upright.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUARTERS = 4


def turned(images: Tensor, quarters: Tensor) -> Tensor:
    """Each image turned counter-clockwise by its own number of quarters; turned by minus that, it is upright again to the bit.

    Args:
        images: (N, C, S, S).
        quarters: (N,), whole numbers.
    """
    quarters = quarters.to(images.device).view(-1, 1, 1, 1) % QUARTERS
    half = torch.where(quarters >= 2, images.flip(2, 3), images)  # chosen, not indexed, so that a GPU's host need not wait
    return torch.where(quarters % 2 == 1, half.rot90(1, (2, 3)), half)


def with_turned(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images upright, and after them each in one of the three other turns: (2 N, C, S, S), and the outputs that they belong to, (2 N,).

    Args:
        images: (N, C, S, S), upright.
        labels: (N,), classes.
        generator: draws the turns.
    """
    quarters = torch.randint(1, QUARTERS, (len(labels),), generator=generator).to(labels.device)
    upright = QUARTERS * labels
    return torch.cat([images, turned(images, quarters)]), torch.cat([upright, upright + quarters])


def outputs_of(classes: Tensor) -> Tensor:
    """The outputs (4 J,) of classes (J,): each class's four turns follow each other."""
    return (QUARTERS * classes[:, None] + torch.arange(QUARTERS, device=classes.device)).flatten()
