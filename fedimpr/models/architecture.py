"""What :func:`fedimpr.models.build` has to know of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

Shape = tuple[int, int, int]


class Architecture(NamedTuple):
    """A network that can be built for any image shape and number of classes.

    Attributes:
        make: ``make(shape, classes, **options)`` gives the network; its keyword-only arguments are its options.
        least: the smallest height and width in pixels that leave something to classify.
        channels: the number of channels that the first layer takes; ``None`` for as many as the images have.
    """

    make: Callable[..., nn.Module]
    least: int
    channels: int | None = None
