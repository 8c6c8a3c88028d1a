"""Labelled images in memory, one byte a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedimpr.errors import DataError

Indices = Tensor | slice | Sequence[int]


@dataclass(frozen=True, eq=False)
class Images:
    """N labelled images of K classes.

    Attributes:
        pixels: uint8, (N, C, H, W). May be mapped from a file: do not write to it.
        labels: int64, (N,), in [0, K).
        classes: the K names.
        domains: int64, (N,), the domain that each image comes from; ``None`` where the data set knows none.
        domain_names: a name for each domain.

    Raises:
        DataError: the tensors have other types or do not fit together.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise DataError("pixels must be uint8, (N, C, H, W)", value=(self.pixels.dtype, tuple(self.pixels.shape)))
        for name, tensor in (("labels", self.labels), ("domains", self.domains)):
            if tensor is not None and (tensor.dtype != torch.int64 or tensor.shape != self.pixels.shape[:1]):
                raise DataError(f"{name} must be int64, one an image", value=(tensor.dtype, tuple(tensor.shape)))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Indices) -> Images:
        """The images at ``indices``, in that order."""
        domains = None if self.domains is None else self.domains[indices]
        return Images(self.pixels[indices], self.labels[indices], self.classes, domains, self.domain_names)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), float32 in [0, 1], and labels (N,) at ``indices``."""
        return self.pixels[indices].float() / 255, self.labels[indices]

    def counts(self) -> Tensor:
        """How many images each class has, int64, (K,)."""
        return torch.bincount(self.labels, minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class Dataset:
    """What is learnt from and what is evaluated on.

    Attributes:
        name: as in the config.
        train: the images that are dealt to the clients.
        test: the test set, or images held out of the training set where the config evaluates on ``validation``.
    """

    name: str
    train: Images
    test: Images
