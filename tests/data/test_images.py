"""Images in memory."""

from __future__ import annotations

import pytest
import torch

from fedimpr.data import Images
from fedimpr.errors import DataError


def four() -> Images:
    pixels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    return Images(pixels, torch.tensor([0, 2, 2, 0]), ("a", "b", "c"), torch.tensor([0, 0, 1, 1]), ("photo", "sketch"))


def test_batches_are_floats_between_zero_and_one() -> None:
    images, labels = four().batch(torch.tensor([3, 1]))
    assert images.dtype == torch.float32 and images.shape == (2, 1, 2, 2)
    assert images[:, 0, 0, 0].tolist() == [1.0, pytest.approx(0.2)]  # 255 / 255 and 51 / 255
    assert labels.tolist() == [0, 2]
    assert torch.equal(four().batch(slice(0, 2))[1], torch.tensor([0, 2]))


def test_subset_keeps_order_classes_and_domains() -> None:
    subset = four().subset([2, 0])
    assert (len(subset), subset.labels.tolist(), subset.pixels[:, 0, 0, 0].tolist()) == (2, [2, 0], [102, 0])
    assert subset.domains is not None and subset.domains.tolist() == [1, 0]
    assert (subset.classes, subset.domain_names) == (("a", "b", "c"), ("photo", "sketch"))


def test_counts_name_empty_classes_too() -> None:
    assert four().counts().tolist() == [2, 0, 2]


def test_tensors_that_do_not_fit_are_refused() -> None:
    data = four()
    with pytest.raises(DataError, match="pixels must be uint8"):
        Images(data.pixels.float(), data.labels, data.classes)
    with pytest.raises(DataError, match="labels must be int64, one an image"):
        Images(data.pixels, data.labels[:3], data.classes)
    with pytest.raises(DataError, match="domains must be int64"):
        Images(data.pixels, data.labels, data.classes, data.labels.float())
