"""Data sets of several domains, made of data sets that have none.

Two kinds of source beside those of :mod:`fedimpr.data.sources`, of the same signature:

* ``joined``: several data sets of the same classes, each a domain.
* ``shifted``: one data set, each of whose images is changed in one way or in none; each way is a domain. Own protocol: which image gets
  into which domain, and how it is changed, is drawn from the split seed and the part (training or test).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fedimpr import seeds
from fedimpr.data.decoding import Encoded, Rows
from fedimpr.data.sources import SOURCES, Part, Settings
from fedimpr.errors import ConfigError, DataError

Change = Callable[[Tensor, torch.Generator], Tensor]
"""Takes images (N, C, H, W) in [0, 1] and gives as many of the same shape."""


def joined(part: Part, settings: Settings, folder: Path, seed: int) -> Rows:
    """The data sets that ``settings`` names, one after another: by domain, the ``source`` and what that takes."""
    found = {name: _rows(part, node, f"dataset.sources.joined.{name}", folder, seed) for name, node in settings.items()}
    if len(found) < 2:
        raise ConfigError("dataset.sources.joined", list(found), "two data sets or more")
    named = {name: rows.classes for name, rows in found.items() if rows.classes is not None}
    if len(set(named.values())) > 1:
        raise DataError("domains name their classes differently", stage="joining " + " and ".join(found), value=named)
    return Rows(
        origin=" and ".join(rows.origin for rows in found.values()),
        images=(image for rows in found.values() for image in rows.images),
        labels=torch.cat([rows.labels for rows in found.values()]),
        classes=next(iter(named.values()), None),
        domains=torch.cat([torch.full_like(rows.labels, domain) for domain, rows in enumerate(found.values())]),
        domain_names=tuple(found),
        files=tuple(file for rows in found.values() for file in rows.files) if all(rows.files for rows in found.values()) else (),
    )


def shifted(part: Part, settings: Settings, folder: Path, seed: int) -> Rows:
    """The data set ``of`` with its images dealt evenly to ``domains``: by name, a ``change`` of :data:`CHANGES` and what that takes."""
    for key in ("of", "domains"):
        if not isinstance(settings.get(key), Mapping):
            raise ConfigError(f"dataset.sources.shifted.{key}", settings.get(key), "a mapping")
    rows = _rows(part, settings["of"], "dataset.sources.shifted.of", folder, seed)
    changes = {name: _change(node, f"dataset.sources.shifted.domains.{name}") for name, node in settings["domains"].items()}
    generator = seeds.generator(seed, f"domains/{part}")
    domains = torch.randperm(len(rows.labels), generator=generator) % len(changes)

    def images() -> Iterator[Encoded | None]:
        each = list(changes.values())
        for row, (image, domain) in enumerate(zip(rows.images, domains.tolist(), strict=True)):
            yield _changed(image, each[domain], seeds.generator(seed, f"shifting/{part}", row), row, rows.origin)

    return Rows(
        origin=f"{rows.origin}, {part}, seed {seed}, {json.dumps(settings['domains'])}",  # a cached image depends on all of it
        images=images(),
        labels=rows.labels,
        classes=rows.classes,
        domains=domains,
        domain_names=tuple(changes),
        files=rows.files,
    )


DOMAIN_SOURCES: dict[str, Callable[[Part, Settings, Path, int], Rows]] = {"joined": joined, "shifted": shifted}


def nothing() -> Change:
    """Images as they are."""
    return lambda images, generator: images


def rotate(*, degrees: tuple[float, float]) -> Change:
    """Turned counter-clockwise by an angle that is uniform between two, in degrees; vacated pixels are black.

    Raises:
        ConfigError: the angles are not ordered, or beyond 180.
    """
    least, most = degrees
    if not -180 <= least <= most <= 180:
        raise ConfigError("degrees", list(degrees), "two angles in [-180, 180], the lesser first")

    def change(images: Tensor, generator: torch.Generator) -> Tensor:
        angles = torch.deg2rad(least + (most - least) * torch.rand(len(images), generator=generator))
        cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
        grid = F.affine_grid(torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    return change


def invert() -> Change:
    """``1 - x``."""
    return lambda images, generator: 1 - images


def blend(*, cells: int) -> Change:
    """``|background - x|``, as MNIST-M blends digits with photographs (Ganin et al., JMLR 2016); here with a smooth random background.

    The background is a grid of ``cells`` x ``cells`` uniform numbers, >= 2, enlarged bilinearly, of its own for each channel.

    Raises:
        ConfigError: there are too few cells.
    """
    if cells < 2:
        raise ConfigError("cells", cells, "an integer >= 2")

    def change(images: Tensor, generator: torch.Generator) -> Tensor:
        coarse = torch.rand(*images.shape[:2], cells, cells, generator=generator)
        return (F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=True) - images).abs()

    return change


CHANGES: dict[str, Callable[..., Change]] = {"none": nothing, "rotate": rotate, "invert": invert, "blend": blend}


def _change(node: Any, key: str) -> Change:
    given = dict(node) if isinstance(node, Mapping) else {}
    name = given.pop("change", None)
    if name not in CHANGES:
        raise ConfigError(f"{key}.change", name, f"one of {', '.join(CHANGES)}")
    try:
        return CHANGES[name](**given)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error.key}", error.value, error.allowed) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(key, given, f"what {name} takes ({error})") from None


def _changed(image: Encoded | None, change: Change, generator: torch.Generator, row: int, origin: str) -> Image.Image | None:
    """One image, decoded and changed; of the mode and size that it had."""
    if image is None:
        return None
    try:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        opened = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"the image in row {row} cannot be decoded: {error}", stage=f"reading {origin}", remedy="Replace it.") from error
    channels, (width, height) = len(opened.getbands()), opened.size
    pixels = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(height, width, channels).permute(2, 0, 1)
    new = (change(pixels[None].float() / 255, generator)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.frombytes(opened.mode, (width, height), new.numpy().tobytes())


def _rows(part: Part, node: Any, key: str, folder: Path, seed: int) -> Rows:
    given = dict(node) if isinstance(node, Mapping) else {}
    source = given.pop("source", None)
    if source not in SOURCES:
        raise ConfigError(f"{key}.source", source, f"one of {', '.join(SOURCES)}")
    return SOURCES[source](part, given, folder, seed)
