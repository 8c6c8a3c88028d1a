"""What may be wrong with a client's labelled images."""

from __future__ import annotations

import pytest
import torch

from fedimpr.data import Images
from fedimpr.data.faults import OnlyClasses, OnlySome, PermutedLabels, WrongLabels
from fedimpr.errors import ConfigError, DataError

HELD = Images(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.arange(40) % 4, tuple("abcd"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_share_of_the_labels_is_wrong() -> None:
    """30 % of 40 are 12."""
    spoiled = WrongLabels(share=0.3)(HELD, generator())
    assert int((spoiled.labels != HELD.labels).sum()) == 12 and set(spoiled.labels.tolist()) == {0, 1, 2, 3}
    assert torch.equal(spoiled.labels, WrongLabels(share=0.3)(HELD, generator()).labels)
    assert not torch.equal(spoiled.labels, WrongLabels(share=0.3)(HELD, generator(1)).labels)
    assert torch.equal(HELD.labels, torch.arange(40) % 4)


def test_classes_have_another_order() -> None:
    assert PermutedLabels()(HELD, generator()).labels.tolist() == [1, 2, 3, 0] * 10


def test_only_some_classes_or_images_are_held() -> None:
    assert OnlyClasses(classes=(1, 3))(HELD, generator()).counts().tolist() == [0, 10, 0, 10]
    assert len(OnlySome(images=10)(HELD, generator())) == 10
    assert len(OnlySome(images=99)(HELD, generator())) == 40
    with pytest.raises(DataError, match=r"no image of these classes .value \[7\]."):
        OnlyClasses(classes=(7,))(HELD, generator())


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        WrongLabels(share=share)
    with pytest.raises(ConfigError, match="images"):
        OnlySome(images=0)
