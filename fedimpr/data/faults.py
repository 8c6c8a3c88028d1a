"""What may be wrong with a client's labelled images: stated axes of experiments, and nothing that happens by itself.

Adapted from the malicious source domains in the experiments of KD3A (Feng et al., ICML 2021, arXiv 2011.09757).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fedimpr.data.images import Images
from fedimpr.errors import ConfigError, DataError


class Fault(Protocol):
    """Changes the images that a client trains on."""

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """Images with the fault; those given stay as they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class WrongLabels:
    """A share of the images, drawn at random, has another label: any of the K - 1 others alike.

    Attributes:
        share: in (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError("share", self.share, "a number in (0, 1]")

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """As :class:`Fault`."""
        places = torch.randperm(len(images), generator=generator)[: round(self.share * len(images))]
        labels, classes = images.labels.clone(), len(images.classes)
        labels[places] = (labels[places] + torch.randint(1, classes, (len(places),), generator=generator)) % classes
        return replace(images, labels=labels)


@dataclass(frozen=True, kw_only=True)
class PermutedLabels:
    """The client numbers the classes in another order: class k is called ``(k + 1) mod K``."""

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """As :class:`Fault`."""
        return replace(images, labels=(images.labels + 1) % len(images.classes))


@dataclass(frozen=True, kw_only=True)
class OnlyClasses:
    """The client holds images of some classes only.

    Attributes:
        classes: their numbers.
    """

    classes: tuple[int, ...]

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """As :class:`Fault`.

        Raises:
            DataError: it is left without images.
        """
        kept = torch.isin(images.labels, torch.tensor(self.classes, dtype=torch.int64)).nonzero().flatten()
        if not len(kept):
            remedy = "Name classes that it holds."
            raise DataError("the client has no image of these classes", stage="faults", value=list(self.classes), remedy=remedy)
        return images.subset(kept)


@dataclass(frozen=True, kw_only=True)
class OnlySome:
    """The client holds fewer images, drawn at random.

    Attributes:
        images: how many, >= 1.
    """

    images: int

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError("images", self.images, "an integer >= 1")

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """As :class:`Fault`."""
        return images.subset(torch.randperm(len(images), generator=generator)[: self.images].sort().values)
