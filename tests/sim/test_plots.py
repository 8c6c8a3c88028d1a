"""The pictures: what stands where, the same bytes every time, and no text that can break them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sim.plots import DPI, GAP, MARGIN, _Block, draw_impressions, draw_partition
from sim.results import Sheet

NAMES = ["<script>", "$\\frac{", "a\nb", "a very long name of a class that cannot fit"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def sheet(labels: list[int], side: int = 28, channels: int = 1) -> Sheet:
    """Image n has the one value n / 10."""
    values = torch.arange(len(labels)) / 10
    return Sheet(values[:, None, None, None].expand(-1, channels, side, side), torch.tensor(labels), NAMES)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_partition([[1, 2], [3, 4]], ["x", "y"], tmp_path / f"{name}-partition.png", "title")
        draw_impressions({"DI": sheet([0, 1])}, tmp_path / f"{name}-impressions.png")
    for picture in ("partition", "impressions"):
        assert (tmp_path / f"a-{picture}.png").read_bytes() == (tmp_path / f"b-{picture}.png").read_bytes()


def test_every_image_stands_under_its_class_pixel_for_pixel(tmp_path: Path) -> None:
    # Class 1: images 0 and 2; class 0: image 1. Columns are in the order of classes.
    draw_impressions({"DI": sheet([1, 0, 1])}, tmp_path / "i.png")
    picture = pixels(tmp_path / "i.png")
    side = 114  # 28 pixels, four times, and a frame of one pixel
    top = MARGIN + _Block.title + _Block.heading
    for value, row, column in ((1, 0, 0), (0, 0, 1), (2, 1, 1)):
        y, x = top + row * (side + GAP), MARGIN + column * (side + GAP)
        square = picture[y : y + side, x : x + side]
        assert np.abs(square[1:-1, 1:-1] - 25.5 * value).max() <= 1
        assert np.abs(square[[0, -1]] - 0.75 * 255).max() <= 1
        assert (picture[y + side, x : x + side] == 255).all()
        assert (picture[y : y + side, x + side] == 255).all()


def test_colours_are_kept(tmp_path: Path) -> None:
    image = torch.tensor([1.0, 0.0, 0.2])[None, :, None, None].expand(1, 3, 32, 32)
    draw_impressions({"CMI": Sheet(image, torch.tensor([0]), ["x"], confidence=torch.tensor([0.5]))}, tmp_path / "i.png")
    y, x = MARGIN + _Block.title + _Block.heading + 5, MARGIN + 5
    assert pixels(tmp_path / "i.png")[y, x].tolist() == [255, 0, 51]


def test_classes_stand_in_the_same_columns_for_every_method() -> None:
    blocks = [_Block(name, sheet(labels), [0, 1, 3]) for name, labels in (("DI", [0, 1, 3]), ("CMI", [3, 3]))]
    assert [block.names for block in blocks] == [[NAMES[0], NAMES[1], NAMES[3]]] * 2
    assert blocks[1].places == [[], [], [0, 1]]


def test_of_many_classes_and_images_a_few_are_shown(tmp_path: Path) -> None:
    labels = torch.arange(100).repeat(6)
    block = _Block("DI", Sheet(torch.zeros(600, 1, 8, 8), labels, [str(k) for k in range(100)]), range(100))
    assert [len(places) for places in block.places] == [4] * 10
    assert block.caption == "DI  (10 of 100 classes)"


@pytest.mark.parametrize(("side", "shown"), [(8, 112), (16, 112), (28, 112), (32, 128), (64, 128), (96, 96), (224, 112)])
def test_images_of_any_size_are_shown_about_as_large(side: int, shown: int) -> None:
    assert _Block("DI", sheet([0], side), [0]).cell_height == shown + 2  # the frame


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (10, 10), (30, 7), (1000, 10), (3, 100)])
def test_partitions_of_any_size_fit_on_a_page(clients: int, classes: int, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 5000, (clients, classes))
    draw_partition(counts, [f"class {k}" for k in range(classes)], tmp_path / "p.png", "title")
    height, width, _ = pixels(tmp_path / "p.png").shape
    assert width <= 13 * DPI and height <= 14 * DPI
    assert (tmp_path / "p.png").stat().st_size < 1_000_000


def test_more_images_are_darker_and_clients_run_to_the_right(tmp_path: Path) -> None:
    # No counts are written into cells of 30 pixels height and 12 width, so their middles are plain colour.
    counts = np.zeros((100, 2), int)
    counts[:50, 0], counts[50:, 0] = 100, 10
    draw_partition(counts, ["x", "y"], tmp_path / "p.png", "title")
    grey = pixels(tmp_path / "p.png").sum(2)
    middle = grey[:, grey.shape[1] // 3], grey[:, grey.shape[1] * 2 // 3]
    assert middle[0].min() < middle[1].min() < 3 * 255 - 50


def test_no_text_is_taken_for_a_formula(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_partition([[1, 0, 2, 3]], NAMES, tmp_path / "p.png", "$\\frac{")
        draw_impressions({"$\\frac{": sheet([0, 1, 2, 3])}, tmp_path / "i.png")


@pytest.mark.parametrize("sheets", [{}, {"DI": Sheet(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), ["x"])}])
def test_nothing_to_show_is_no_error(sheets: dict[str, Sheet], tmp_path: Path) -> None:
    draw_impressions(sheets, tmp_path / "i.png")
    assert pixels(tmp_path / "i.png").size > 0


def test_empty_partition_counts_are_no_error(tmp_path: Path) -> None:
    draw_partition([[0, 0], [0, 0]], ["x", "y"], tmp_path / "p.png", "title")
    assert pixels(tmp_path / "p.png").size > 0
