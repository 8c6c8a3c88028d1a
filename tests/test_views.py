"""Random views."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import ConfigError
from fedimpr.views import Dilated, Distorted, Superimposed, Views

STILL = {"shift": 0.0, "scale": (1.0, 1.0), "rotation": 0.0, "flip": False}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_any_freedom_a_view_is_the_image() -> None:
    images = torch.rand(3, 1, 8, 8)
    assert Views(**STILL)(images, generator()) is images


def test_shifts_are_whole_pixels_and_leave_black() -> None:
    """An image with one white pixel keeps one white pixel, moved by at most shift * side = 2 pixels along either axis."""
    images = torch.zeros(200, 1, 8, 8)
    images[:, :, 4, 4] = 1
    moved = Views(**{**STILL, "shift": 0.25})(images, generator())
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.ones(200))
    places = moved.flatten(1).argmax(1)
    rows, columns = places // 8, places % 8
    for axis in (rows, columns):
        assert sorted(axis.unique().tolist()) == [2, 3, 4, 5, 6]


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.rand(400, 1, 4, 4)
    views = Views(**{**STILL, "flip": True})(images, generator())
    mirrored = (views - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    same = (views - images).abs().amax((1, 2, 3)) < 1e-5
    assert bool((mirrored ^ same).all()) and 150 < int(mirrored.sum()) < 250


def test_a_crop_shows_a_part_of_the_image() -> None:
    """A quarter of a horizontal ramp 0 ... 1 is half as wide, so it spans about half of the ramp."""
    ramp = torch.linspace(0, 1, 32).expand(100, 1, 32, 32)
    views = Views(**{**STILL, "scale": (0.25, 0.25)})(ramp, generator())
    span = views.amax(3) - views.amin(3)
    assert float(span.min()) > 0.4 and float(span.max()) < 0.55
    assert float(views.mean((1, 2, 3)).std()) > 0.05  # placed at random


def test_above_one_an_image_is_shrunk_onto_black() -> None:
    """At scale 4 a white image has half its height and width, so it covers a quarter of the view, anywhere in it."""
    views = Views(**{**STILL, "scale": (4.0, 4.0)})(torch.ones(100, 1, 16, 16), generator())
    torch.testing.assert_close(views.mean((1, 2, 3)), torch.full((100,), 0.25), atol=0.04, rtol=0)
    assert float(views.amin()) == 0 and float(views.amax()) == pytest.approx(1)
    left = views.amax((1, 2)).argmax(1)  # the first column that is not black
    assert len(left.unique()) > 5


def test_a_half_turn_by_rotation_of_180_degrees_stays_in_range() -> None:
    views = Views(**{**STILL, "rotation": 180.0})(torch.rand(20, 3, 9, 9), generator())
    assert float(views.min()) >= 0 and float(views.max()) <= 1 + 1e-6


@given(st.integers(0, 2**31), st.floats(0, 0.5), st.floats(0.1, 1.0), st.floats(0, 90), st.booleans())
def test_same_generator_same_views_and_gradients_flow(seed: int, shift: float, least: float, rotation: float, flip: bool) -> None:
    views = Views(shift=shift, scale=(least, 1.0), rotation=rotation, flip=flip)
    images = torch.rand(2, 1, 6, 6, generator=generator(1)).requires_grad_()
    one, two = views(images, generator(seed)), views(images, generator(seed))
    assert torch.equal(one, two) and one.shape == images.shape
    one.sum().backward()
    assert bool(images.grad.isfinite().all())


def distorted(**changes) -> Distorted:
    return Distorted(**{"blur": 0.0, "contrast": 1.0, "views": Views(**STILL), **changes})


def test_without_blur_and_contrast_nothing_is_distorted() -> None:
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(distorted()(images, generator()), images)


def test_blur_averages_over_three_by_three_pixels() -> None:
    """A white pixel inside a black image becomes nine of a ninth; at the corner it is shared by four, so it leaves a quarter there."""
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 1 / 9
    torch.testing.assert_close(distorted(blur=1.0)(image, generator())[0, 0], expected)
    corner = torch.zeros(1, 1, 5, 5)
    corner[0, 0, 0, 0] = 1
    assert distorted(blur=1.0)(corner, generator())[0, 0, 0, 0].item() == pytest.approx(1 / 4)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(0, 99))
def test_blur_is_a_mean_pooling_of_what_is_inside(height: int, width: int, channels: int, seed: int) -> None:
    images = torch.rand(2, channels, height, width, generator=generator(seed))
    expected = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(distorted(blur=1.0)(images, generator()), expected)


def test_about_the_given_share_of_images_is_blurred() -> None:
    images = torch.rand(400, 1, 4, 4, generator=generator(1))
    same = (distorted(blur=0.3)(images, generator()) == images).flatten(1).all(1)
    assert 240 < int(same.sum()) < 320  # 280 expected, deviation 9


def test_contrast_is_a_line_that_is_cut_to_the_range() -> None:
    """Every image becomes f (x - l) + b, so where nothing is cut its ramp is a line of slope f in [1 / 3, 3]."""
    ramp = torch.linspace(0.0, 1.0, 9).expand(200, 1, 1, 9)
    made = distorted(contrast=3.0)(ramp, generator())
    slopes = made.diff(dim=3) * 8
    whole = ((made > 0) & (made < 1)).flatten(1).all(1)
    assert int(whole.sum()) > 10 and int(whole.sum()) < 200
    torch.testing.assert_close(slopes[whole].amin((1, 2, 3)), slopes[whole].amax((1, 2, 3)), atol=1e-4, rtol=0)
    assert float(slopes.amax()) <= 3 + 1e-4 and float(slopes[whole].amin()) >= 1 / 3 - 1e-4
    assert float(made.min()) == 0 and float(made.max()) == 1


def test_views_come_last_so_that_black_stays_black() -> None:
    shrunk = Views(**{**STILL, "scale": (4.0, 4.0)})
    made = distorted(contrast=3.0, views=shrunk)(torch.ones(20, 1, 16, 16), generator())
    assert float((made == 0).float().mean()) > 0.6


@pytest.mark.parametrize(("wrong", "key"), [({"blur": 1.5}, "blur"), ({"contrast": 0.5}, "contrast")])
def test_impossible_distortions_are_refused(wrong: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        distorted(**wrong)


@pytest.mark.parametrize("wrong", [{"shift": 2.0}, {"scale": (0.0, 1.0)}, {"scale": (1.0, 0.5)}, {"rotation": -1.0}])
def test_impossible_views_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Views(**{**STILL, **wrong})


def test_dilation_makes_a_line_three_pixels_wide() -> None:
    """The brightest of 3x3 pixels: a faint line of one column fills the columns beside it, and no other."""
    line = torch.zeros(1, 1, 5, 7)
    line[..., 3] = 0.25
    expected = torch.zeros(5, 7)
    expected[:, 2:5] = 0.25
    torch.testing.assert_close(Dilated(share=1.0, views=Views(**STILL))(line, generator())[0, 0], expected)


def test_superimposed_images_are_the_brighter_of_two_of_the_batch() -> None:
    """Image i has one pixel, the i-th, of brightness 1 - i / 4: it stays, and one more comes, unless an image is laid over itself."""
    images = torch.diag(1 - torch.arange(4) / 4).view(4, 1, 2, 2)
    laid = Superimposed(share=1.0, views=Views(**STILL))(images, generator())
    assert bool((laid >= images).all())
    added = (laid - images).flatten(1)  # of the other one, and nothing where an image met itself
    for row in added:
        assert sorted(row.tolist())[:3] == [0, 0, 0]
    met = [int(row.argmax()) if row.max() > 0 else place for place, row in enumerate(added)]
    assert sorted(met) == [0, 1, 2, 3]  # each is laid over one
    assert all(row.max() in (0, 1 - place / 4) for place, row in zip(met, added, strict=True))


@pytest.mark.parametrize("kind", [Dilated, Superimposed])
def test_about_the_given_share_of_images_is_changed_and_all_are_viewed(kind: type) -> None:
    images = torch.rand(400, 1, 4, 4, generator=generator(1))
    same = (kind(share=0.3, views=Views(**STILL))(images, generator()) == images).flatten(1).all(1)
    assert 240 < int(same.sum()) < 320  # 280 expected, deviation 9
    shrunk = kind(share=0.3, views=Views(**{**STILL, "scale": (4.0, 4.0)}))(torch.ones(20, 1, 16, 16), generator())
    assert float(shrunk.mean((1, 2, 3)).max()) < 0.4  # a quarter of the canvas, and its soft edges


@pytest.mark.parametrize("kind", [Dilated, Superimposed])
@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_the_unit_interval_is_refused(kind: type, share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        kind(share=share, views=Views(**STILL))
