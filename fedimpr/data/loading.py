"""Loading a data set as its yaml describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedimpr.data.decoding import Rows, Shape, decode
from fedimpr.data.domains import DOMAIN_SOURCES
from fedimpr.data.images import Dataset, Images
from fedimpr.data.sources import SOURCES
from fedimpr.data.splits import hold_out
from fedimpr.errors import ConfigError, DataError


def load(
    *,
    name: str,
    source: str,
    sources: Mapping[str, Mapping[str, Any]],
    folder: str | Path,
    cache: str | Path,
    shape: Sequence[int],
    resize: bool,
    classes: int,
    evaluate: str,
    validation: float,
    split_seed: int,
) -> Dataset:
    """Load training and test images.

    Args:
        name: of the data set.
        source: which entry of ``sources`` to take: ``embedded``, ``parquet``, ``folder``, ``torchvision`` or ``huggingface``; or, of data
            sets of several domains, ``joined`` or ``shifted``.
        sources: where the data set may come from; what each entry holds stands with the functions of :mod:`fedimpr.data.sources` and of
            :mod:`fedimpr.data.domains`.
        folder: holds the files, or takes the downloads.
        cache: a folder for decoded images.
        shape: (C, H, W) of the images, C 1 or 3.
        resize: whether to convert images of another size or mode.
        classes: K.
        evaluate: ``"test"``, or ``"validation"`` to hold images out of the training set and leave the test set unread, so that settings
            can be chosen without looking at it.
        validation: the share of every class that is then held out, in (0, 1).
        split_seed: decides what is held out.

    Raises:
        ConfigError: a setting is unknown, missing or out of range.
        DataError: files are missing or damaged, an image has another size than ``shape``, labels are out of range, or a class has no
            training image.
    """
    kinds = SOURCES | DOMAIN_SOURCES
    if source not in sources or source not in kinds:
        raise ConfigError("dataset.source", source, f"one of {', '.join(key for key in sources if key in kinds)} for {name}")
    if evaluate not in ("test", "validation"):
        raise ConfigError("dataset.evaluate", evaluate, "test or validation")
    size = _shape(shape)

    def part(which: Any) -> Images:
        rows = kinds[source](which, sources[source], Path(folder).expanduser(), split_seed)
        names = _checked(rows, classes)
        pixels = decode(rows, shape=size, resize=resize, cache=Path(cache).expanduser())
        return Images(pixels, rows.labels, names, rows.domains, rows.domain_names)

    train = part("train")
    absent = (train.counts() == 0).nonzero().flatten().tolist()
    if absent:
        absent_names = ", ".join(f"{k} ({train.classes[k]})" for k in absent)
        raise DataError(
            f"no training image of class {absent_names}", stage=f"loading {name}", remedy="Add images or lower dataset.classes."
        )
    if evaluate == "validation":
        kept, held = hold_out(train.labels, validation, split_seed, key="dataset.validation")
        return Dataset(name, train.subset(kept), train.subset(held))
    test = part("test")
    if (test.classes, test.domain_names) != (train.classes, train.domain_names):
        raise DataError("training and test set name their classes or domains differently", stage=f"loading {name}", value=test.classes)
    return Dataset(name, train, test)


def _shape(shape: Sequence[int]) -> Shape:
    try:
        channels, height, width = (int(side) for side in shape)
    except (TypeError, ValueError):
        channels = height = width = 0
    if channels not in (1, 3) or min(height, width) < 1:
        raise ConfigError("dataset.shape", shape, "[C, H, W] with 1 or 3 channels")
    return channels, height, width


def _checked(rows: Rows, classes: int) -> tuple[str, ...]:
    """The names of the classes, after a look at everything but the images."""
    stage = f"reading {rows.origin}"
    if not len(rows.labels):
        raise DataError("there are no images", stage=stage, remedy="Check the files that the config names.")
    names = rows.classes or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise ConfigError("dataset.classes", classes, f"{len(names)}, as {rows.origin} names them")
    _in_range("label", rows.labels, classes, stage)
    if rows.domains is not None:
        _in_range("domain", rows.domains, len(rows.domain_names), stage)
    return names


def _in_range(what: str, values: Tensor, end: int, stage: str) -> None:
    wrong = ((values < 0) | (values >= end)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"the {what} in row {row} is not in [0, {end})", stage=stage, value=int(values[row]))
