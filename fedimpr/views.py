"""Random views of images: shifts, crops, rotations and flips of a whole batch in one differentiable resampling; and corruptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedimpr import seeds
from fedimpr.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Views:
    """A distribution over views; each image of a batch gets its own.

    Attributes:
        shift: largest shift along either axis as a fraction of the image's side, in [0, 1]. Shifts are whole pixels and vacated
            pixels are black: a crop after padding, as for CIFAR with ``4 / 32``.
        scale: (least, largest) share of the image's area that a view shows, 0 < least <= largest; the shown part is placed at random and
            resized to the whole. (1, 1) shows everything. Above 1 the image is shrunk and placed at random, with black around it: at 4 it
            has half its height and width.
        rotation: largest rotation either way, degrees (of square images).
        flip: whether half of the views are mirrored left to right.
    """

    shift: float
    scale: tuple[float, float]
    rotation: float
    flip: bool

    def __post_init__(self) -> None:
        _check_share("shift", self.shift)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError("scale", self.scale, "two numbers, 0 < least <= largest")
        if not 0 <= self.rotation <= 180:
            raise ConfigError("rotation", self.rotation, "degrees in [0, 180]")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Views (N, C, H, W) of images (N, C, H, W), differentiable with respect to the images."""
        if self.shift == 0 and self.scale == (1, 1) and self.rotation == 0 and not self.flip:
            return images
        n, _, height, width = images.shape
        source = seeds.on_device(generator, images.device)
        u = torch.rand(n, 7, generator=source, device=images.device)
        side = (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 0]).sqrt()
        angle = math.radians(self.rotation) * (2 * u[:, 1] - 1)
        mirror = torch.where(u[:, 2] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(side)
        # In grid_sample's coordinates an image spans [-1, 1], so a pixel is 2 / side wide.
        size = torch.tensor([width, height], device=images.device)
        reach = (self.shift * size).floor()
        shift = ((2 * u[:, 3:5] - 1) * (reach + 0.5)).round() * 2 / size
        room = (1 - side)[:, None] * (1 - 1 / size)  # a crop's outermost samples stay on pixel centres, so no black bleeds in
        offset = shift + room * (2 * u[:, 5:7] - 1)
        cos, sin = side * angle.cos(), side * angle.sin()
        rows = torch.stack([cos * mirror, -sin, offset[:, 0], sin * mirror, cos, offset[:, 1]], 1)
        grid = F.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Augmentation(Protocol):
    """A distribution over changes of images."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changed images (N, C, H, W) in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Distorted:
    """Images that are blurred, changed in contrast and then moved, each in its own way: heavy augmentation of a transfer set.

    Impressions that are mined from weights alone look like textures all over the image. Distorted and shrunk onto black they hold more of
    what real images hold, and the teacher, asked again, says what it thinks of that. ZSKD's released student is trained so, with shrinking,
    shifts, rotations, flips and two kinds of noise (Nayak et al., ICML 2019); blur and contrast, in place of noise, are our own.

    Attributes:
        blur: share of the images that are averaged over 3x3 pixels, in [0, 1].
        contrast: largest factor c >= 1. An image x becomes ``f (x - l) + b`` with f uniform in [1 / c, c], a level l in [0, 1] and a
            brightness b in [0, 0.5], cut to [0, 1]; 1 leaves images as they are.
        views: how images are moved after that, so that the black around them stays black.
    """

    blur: float
    contrast: float
    views: Views

    def __post_init__(self) -> None:
        _check_share("blur", self.blur)
        if self.contrast < 1:
            raise ConfigError("contrast", self.contrast, "a number >= 1")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Distorted images (N, C, H, W) in [0, 1]."""
        source = seeds.on_device(generator, images.device)
        u = torch.rand(4, len(images), 1, 1, 1, generator=source, device=images.device)
        images = torch.where(u[0] < self.blur, _blurred(images), images)
        if self.contrast > 1:
            factor = 1 / self.contrast + (self.contrast - 1 / self.contrast) * u[1]
            images = (factor * (images - u[2]) + u[3] / 2).clamp(0, 1)
        return self.views(images, source)


@dataclass(frozen=True, kw_only=True)
class Dilated:
    """A share of the images with thicker bright strokes: each pixel becomes the brightest of the 3x3 around it.

    Strokes that are mined from weights are often thinner than real ones: to many a teacher of digits a thin, faint line is a sure one. A
    student that never saw a thick one mistakes it. Our own; for bright strokes on black.

    Attributes:
        share: of the images that are dilated, in [0, 1].
        views: how all of them are changed after that.
    """

    share: float
    views: Augmentation

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changed images (N, C, H, W)."""
        source = seeds.on_device(generator, images.device)
        return self.views(torch.where(_chosen(images, self.share, source), _brightest(images), images), source)


@dataclass(frozen=True, kw_only=True)
class Superimposed:
    """A share of the images with another one of the batch laid over them: each pixel becomes the brighter of both.

    Strokes that are mined from weights seldom close loops and cross one another as those of real digits do; those of two images do, and the
    teacher says what it thinks of them. Where mixup (Zhang et al., ICLR 2018) weighs two images, this keeps both at full brightness. Our
    own; for bright strokes on black.

    Attributes:
        share: of the images that get another one over them, in [0, 1].
        views: how all of them are changed after that.
    """

    share: float
    views: Augmentation

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changed images (N, C, H, W)."""
        source = seeds.on_device(generator, images.device)
        chosen = _chosen(images, self.share, source)
        other = images[torch.randperm(len(images), generator=source, device=images.device)]
        return self.views(torch.where(chosen, torch.maximum(images, other), images), source)


def _check_share(key: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(key, share, "a number in [0, 1]")


def _chosen(images: Tensor, share: float, source: torch.Generator) -> Tensor:
    """Which images (N, 1, 1, 1) are of a random share."""
    return torch.rand(len(images), 1, 1, 1, generator=source, device=images.device) < share


def _blurred(images: Tensor) -> Tensor:
    """The mean of those of the 3x3 around each pixel that are inside: a CPU's mean-pooling takes twice as long."""
    inside = torch.ones_like(images[:1, :1])
    return _around(images, torch.add) / _around(inside, torch.add)


def _brightest(images: Tensor) -> Tensor:
    """The brightest of the 3x3 around each pixel: a CPU's max-pooling takes fifteen times as long."""
    return _around(images, torch.maximum)  # the black around images is never the brightest


def _around(images: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The 3x3 around each pixel combined, black around images, along rows and then along columns."""
    wide = F.pad(images, (1, 1, 1, 1))
    rows = combine(combine(wide[..., :-2], wide[..., 1:-1]), wide[..., 2:])
    return combine(combine(rows[..., :-2, :], rows[..., 1:-1, :]), rows[..., 2:, :])
