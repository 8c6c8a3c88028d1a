"""A small data set and the way to load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_files import grey, png, write_parquet

from fedimpr.data import Dataset, load


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with 12 training and 6 test images of three classes: 4x4, grey."""
    for part, count, seed in (("train", 12, 0), ("test", 6, 1)):
        images: list[bytes | None] = [png(pixels) for pixels in grey(count, seed=seed)]
        write_parquet(tmp_path / f"{part}.parquet", images, [k % 3 for k in range(count)], ["cat", "dog", "owl"])
    return tmp_path


@pytest.fixture
def loads(tmp_path: Path) -> Callable[..., Dataset]:
    """``load`` with the settings of ``three`` but for those given."""

    def call(**settings: Any) -> Dataset:
        return load(
            **{
                **{"name": "three", "source": "parquet", "sources": {"parquet": {"train": "train.parquet", "test": "test.parquet"}}},
                **{"folder": tmp_path, "cache": tmp_path / "cache", "shape": [1, 4, 4], "resize": False, "classes": 3},
                **{"evaluate": "test", "validation": 0.25, "split_seed": 0},
                **settings,
            }
        )

    return call
