"""From encoded images to one array of bytes, which is kept on disk so that decoding happens once."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedimpr.errors import ConfigError, DataError

Shape = tuple[int, int, int]
Encoded = bytes | Image.Image


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One part of a data set before its images are decoded.

    Attributes:
        origin: the file or data set, for errors.
        images: as many encoded images as there are labels; ``None`` stands for a missing one. Iterated at most once.
        labels: int64, (N,).
        classes: names, or ``None`` where the source knows none.
        domains: int64, (N,), or ``None``.
        domain_names: a name for each domain.
        files: the files that the images come from. While their sizes and times stay, so do the images. Empty: do not cache.
    """

    origin: str
    images: Iterable[Encoded | None]
    labels: Tensor
    classes: tuple[str, ...] | None
    domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def decode(rows: Rows, *, shape: Shape, resize: bool, cache: Path) -> Tensor:
    """Decode the images of ``rows``, or map them from the cache.

    Args:
        rows: what to decode.
        shape: (C, H, W) wanted; C is 1 (grey) or 3 (RGB).
        resize: whether images of another size or mode are converted, bilinearly, or refused.
        cache: the folder of decoded arrays. Several processes may share it; an entry that cannot be used is rebuilt.

    Returns:
        uint8, (N, C, H, W).

    Raises:
        DataError: an image cannot be decoded or, without ``resize``, is not of the shape wanted.
        ConfigError: the cache cannot be written.
    """
    if not rows.files:
        return torch.from_numpy(_decode_all(rows, shape, resize))
    entry = cache / f"{_key(rows, shape, resize)}.npy"
    wanted = (len(rows.labels), *shape)
    array = _mapped(entry, wanted)
    if array is None:
        decoded = _decode_all(rows, shape, resize)
        try:
            _write(entry, decoded)
        except OSError as error:
            raise ConfigError("dataset.cache", str(cache), f"a folder that can be written ({error.strerror})") from error
        array = _mapped(entry, wanted)
    return torch.from_numpy(decoded if array is None else array)


def _decode_all(rows: Rows, shape: Shape, resize: bool) -> NDArray[np.uint8]:
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    out = np.empty((len(rows.labels), height, width, channels), np.uint8)
    stage = f"reading {rows.origin}"
    for row, encoded in enumerate(rows.images):
        try:
            if encoded is None:
                raise ValueError("it is empty")
            image = Image.open(io.BytesIO(encoded)) if isinstance(encoded, bytes) else encoded
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"the image in row {row} cannot be decoded: {error}", stage=stage, remedy="Replace or remove it.") from error
        if resize and (image.mode, image.size) != (mode, (width, height)):
            image = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
        if (image.mode, image.size) != (mode, (width, height)):
            found, wanted = f"{image.mode} {image.height}x{image.width}", f"{mode} {height}x{width}"
            remedy = "Set dataset.resize=true, or dataset.shape to the size of the images."
            raise DataError(f"the image in row {row} is {found} instead of {wanted}", stage=stage, remedy=remedy)
        out[row] = np.asarray(image).reshape(height, width, channels)
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def _key(rows: Rows, shape: Shape, resize: bool) -> str:
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in rows.files]
    return hashlib.sha256(json.dumps([rows.origin, files, shape, resize]).encode()).hexdigest()[:32]


def _mapped(entry: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    try:
        # Copy on write: never written back, and unlike a read-only map PyTorch takes it without complaint.
        array: NDArray[np.uint8] = np.load(entry, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


def _write(entry: Path, array: NDArray[np.uint8]) -> None:
    """Under another name first, so that no process ever maps half an entry."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=entry.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(draft, entry)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise
