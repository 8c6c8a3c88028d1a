"""Data sets of several domains, made of data sets that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedimpr.data import Dataset, load
from fedimpr.data.domains import CHANGES
from fedimpr.errors import ConfigError, DataError, FedimprError
from sim.config import composed

DIGITS = {"source": "embedded", "dataset": "digits", "test": 0.2}
TURNS = {
    "plain": {"change": "none"},
    "left": {"change": "rotate", "degrees": [90.0, 90.0]},
    "negative": {"change": "invert"},
    "mixed": {"change": "blend", "cells": 2},
}


def loaded(tmp_path: Path, source: str, settings: dict, **other) -> Dataset:
    given = {"name": "made", "folder": tmp_path, "cache": tmp_path / "cache", "shape": (1, 8, 8), "resize": False, "classes": 10}
    split = {"evaluate": "test", "validation": 0.1, "split_seed": 0}
    return load(**{**given, **split, **other}, source=source, sources={source: settings})


def changed(name: str, images: torch.Tensor, **numbers) -> torch.Tensor:
    return CHANGES[name](**numbers)(images, torch.Generator().manual_seed(0))


def test_each_image_is_in_one_domain_and_looks_as_that_domain_has_it(tmp_path: Path) -> None:
    data, plain = loaded(tmp_path, "shifted", {"of": DIGITS, "domains": TURNS}), loaded(tmp_path, "embedded", DIGITS)
    for part, before in ((data.train, plain.train), (data.test, plain.test)):
        assert part.domain_names == tuple(TURNS) and torch.equal(part.labels, before.labels) and part.domains is not None
        counts = part.domains.bincount()
        assert len(counts) == 4 and int(counts.max() - counts.min()) <= 1
        one, two, three, four = ((part.domains == domain).nonzero().flatten() for domain in range(4))
        assert torch.equal(part.pixels[one], before.pixels[one])
        assert torch.equal(part.pixels[two], before.pixels[two].rot90(dims=(2, 3)))
        assert torch.equal(part.pixels[three], 255 - before.pixels[three])
        # |b - x| for a b in [0, 255]: where x is 0 it is b, and it never exceeds the larger of x and 255 - x.
        assert int((part.pixels[four].int() - torch.maximum(before.pixels[four], 255 - before.pixels[four]).int()).max()) <= 0
        assert not torch.equal(part.pixels[four], before.pixels[four])


def test_the_split_seed_decides_which_image_is_in_which_domain(tmp_path: Path) -> None:
    settings = {"of": DIGITS, "domains": TURNS}
    one, two, other = (loaded(tmp_path, "shifted", settings, split_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.train.pixels, two.train.pixels) and torch.equal(one.train.domains, two.train.domains)
    assert not torch.equal(one.train.domains, other.train.domains)


def test_angles_lie_between_the_two_and_turn_counter_clockwise() -> None:
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 2] = 1  # to the right of the middle
    turned = changed("rotate", image, degrees=(90.0, 90.0))
    assert turned[0, 0, 0, 1].item() == pytest.approx(1, abs=1e-5)  # above it
    assert torch.equal(changed("rotate", image, degrees=(0.0, 0.0)), image)


def test_a_background_is_smooth_and_of_each_image_its_own() -> None:
    black = torch.zeros(2, 1, 9, 9)
    backgrounds = changed("blend", black, cells=3)  # |b - 0| = b
    corners = backgrounds[:, :, ::4, ::4]  # the grid's own numbers
    middle = (corners[:, :, 0, 0] + corners[:, :, 0, 1]) / 2
    torch.testing.assert_close(backgrounds[:, :, 0, 2], middle)
    assert not torch.equal(backgrounds[0], backgrounds[1])
    torch.testing.assert_close(changed("blend", torch.ones(2, 1, 9, 9), cells=3), 1 - backgrounds)


def test_joined_data_sets_are_domains_of_one(tmp_path: Path) -> None:
    both = loaded(tmp_path, "joined", {"one": DIGITS, "two": {**DIGITS, "test": 0.5}})
    one, two = (loaded(tmp_path, "embedded", {**DIGITS, "test": share}) for share in (0.2, 0.5))
    assert both.train.domain_names == ("one", "two") and both.train.classes == one.train.classes
    assert torch.equal(both.train.pixels, torch.cat([one.train.pixels, two.train.pixels]))
    assert torch.equal(both.test.labels, torch.cat([one.test.labels, two.test.labels]))
    assert both.train.domains is not None and both.train.domains.bincount().tolist() == [len(one.train), len(two.train)]


def test_domains_of_another_size_are_refused_or_brought_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedimpr.data import domains

    def larger(part, settings, folder, seed):
        rows = domains.SOURCES["embedded"](part, settings, folder, seed)
        return domains.Rows(**{**vars(rows), "images": [image.resize((12, 12)) for image in rows.images]})

    monkeypatch.setattr(domains, "SOURCES", {**domains.SOURCES, "folder": larger})
    settings = {"small": DIGITS, "large": {**DIGITS, "source": "folder"}}
    with pytest.raises(DataError, match=r"row \d+ is L 12x12 instead of L 8x8. Set dataset.resize=true"):
        loaded(tmp_path, "joined", settings)
    assert loaded(tmp_path, "joined", settings, resize=True).train.pixels.shape[1:] == (1, 8, 8)


WRONG = [
    ("shifted", {}, r"'dataset.sources.shifted.of' is None; allowed: a mapping"),
    ("shifted", {"of": {"source": "ftp"}, "domains": TURNS}, r"'dataset.sources.shifted.of.source' is 'ftp'; allowed: one of embedded"),
    ("shifted", {"of": DIGITS, "domains": {"a": {"change": "mirror"}}}, r"'dataset.sources.shifted.domains.a.change' is 'mirror'"),
    ("shifted", {"of": DIGITS, "domains": {"a": {"change": "rotate"}}}, r"shifted.domains.a' is {}; allowed: what rotate takes"),
    ("shifted", {"of": DIGITS, "domains": {"a": {"change": "rotate", "degrees": [9, 1]}}}, r"domains.a.degrees' is \[9, 1\]"),
    ("shifted", {"of": DIGITS, "domains": {"a": {"change": "blend", "cells": 1}}}, r"domains.a.cells' is 1; allowed: an integer >= 2"),
    ("joined", {"one": DIGITS}, r"'dataset.sources.joined' is \['one'\]; allowed: two data sets or more"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "settings", "told"), WRONG, ids=[told[:60] for *_, told in WRONG])
def test_a_wrong_setting_is_one_line(tmp_path: Path, source: str, settings: dict, told: str) -> None:
    with pytest.raises(FedimprError, match=told) as caught:
        loaded(tmp_path, source, settings)
    assert "\n" not in str(caught.value)


def test_classes_of_other_names_are_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedimpr.data import domains

    def renamed(part, settings, folder, seed):
        return domains.Rows(**{**vars(domains.SOURCES["embedded"](part, settings, folder, seed)), "classes": tuple("abcdefghij")})

    monkeypatch.setattr(domains, "SOURCES", {**domains.SOURCES, "folder": renamed})
    with pytest.raises(DataError, match="joining one and two: domains name their classes differently"):
        loaded(tmp_path, "joined", {"one": DIGITS, "two": {**DIGITS, "source": "folder"}})


@pytest.mark.parametrize("name", ["mnist_shifts", "mnist_digits"])
def test_the_data_sets_that_ship_say_what_they_are_made_of(name: str, tmp_path: Path) -> None:
    """Without the files: the error is that of a missing folder, and no other."""
    with pytest.raises((ConfigError, DataError), match="dataset.folder"):
        settings = composed([f"dataset={name}", f"dataset.folder='{tmp_path / 'nowhere'}'"]).dataset
        load(**{key: value for key, value in settings.items() if key not in ("mean", "std", "flip")})
