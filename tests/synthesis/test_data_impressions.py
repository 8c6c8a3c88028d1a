"""Data impressions: the loop of ZSKD's algorithm, worked out by hand; its targets stand in ``test_targets.py``."""

from __future__ import annotations

import pytest
import torch

from fedimpr.errors import ConfigError, TeacherError
from fedimpr.synthesis import DataImpressions
from fedimpr.synthesis.targets import ClassSimilarity, FeatureGaussian, OneHot
from fedimpr.views import Views
from tests.makers import CLASSES, SHAPE, Linear, priors, small_model
from tests.synthesis.faulty import Faulty

STILL = {"shift": 0.0, "scale": (1.0, 1.0), "rotation": 0.0, "flip": False}
SCALING = {"text": "matrix", "as_released": "rows"}


def method(*, betas: tuple[float, ...] = (0.1, 1.0), **changes) -> DataImpressions:
    settings = {"priors": priors(target=1.0), "temperature": 20.0, "steps": 30, "lr": 0.05, "batch_size": 16, "variant": "text"}
    settings |= {"brightness": 1.0, "views": Views(**STILL), **changes}
    return DataImpressions(**{"targets": ClassSimilarity(betas=betas, scaling=SCALING.get(settings["variant"], "rows")), **settings})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_start_as_noise_of_the_asked_brightness() -> None:
    """A step of next to nothing leaves the images where they started: in [0, 0.1]."""
    mined = method(steps=1, lr=1e-9, brightness=0.1).synthesize(small_model(), 16, generator(), shape=SHAPE)
    assert 0.09 < float(mined.images.max()) <= 0.1 + 1e-6
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match="'brightness' is"):
            method(brightness=wrong)


def test_one_step_is_the_step_of_adam_on_the_softened_cross_entropy() -> None:
    """Adam's first step moves every pixel by lr against the sign of its gradient; then the image is projected to [0, 1].

    With logits z = W x the gradient of CE(y, softmax(z / tau)) with respect to x is W^T (softmax(z / tau) - y) / tau.
    """
    weight, tau, lr = torch.tensor([[2.0, -1.0], [-3.0, 1.0]]), 20.0, 0.1
    teacher, shape = Linear(weight.tolist()), (1, 1, 2)
    one = method(betas=(1.0,), temperature=tau, steps=1, lr=lr, batch_size=8)
    drawn = one.targets.draw(teacher, 8, shape, tau, source := generator(3))
    order = torch.randperm(8, generator=source)
    y, wanted = drawn.distributions[order], drawn.labels[order]
    start = torch.rand(8, *shape, generator=source)
    p = torch.softmax(start.flatten(1) @ weight.T / tau, 1)
    expected = (start.flatten(1) - lr * ((p - y) @ weight / tau).sign()).clamp(0, 1)
    made = one.synthesize(teacher, 8, generator(3), shape=shape)
    torch.testing.assert_close(made.images.flatten(1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.targets, torch.softmax(made.images.flatten(1) @ weight.T / tau, 1))
    assert torch.equal(made.labels, wanted)
    assert made.teacher_passes == 8 + 8  # one step, and the labelling


@pytest.mark.parametrize("variant", ["text", "as_released"])
def test_impressions_come_close_to_their_targets(variant: str) -> None:
    """The teacher's softened answer to an impression is far closer to its target than its answer to noise."""
    teacher = Linear(torch.randn(4, 64, generator=generator(5)).tolist())
    few, many = (method(steps=steps, variant=variant, temperature=1.0) for steps in (1, 100))
    loss = []
    for one in (few, many):
        seen: list[float] = []
        one.synthesize(teacher, 40, generator(), shape=SHAPE, progress=lambda stage, done, total, loss, seen=seen: seen.append(float(loss)))
        loss.append(seen[-1])
    assert loss[1] < 0.7 * loss[0]


def test_class_impressions_make_the_teacher_certain_of_their_class() -> None:
    """Ten classes, each the brightness of its own pixel: an impression of class k has that pixel white and the others black."""
    made = method(targets=OneHot(), temperature=1.0, steps=60).synthesize(Linear(torch.eye(10).tolist()), 20, generator(), shape=(1, 2, 5))
    torch.testing.assert_close(made.images.flatten(1), torch.eye(10)[made.labels])
    assert torch.bincount(made.labels).tolist() == [2] * 10


def test_soft_targeted_impressions_come_close_to_answers_that_the_teacher_can_give() -> None:
    """With an activation prior the features are larger than without."""
    teacher = small_model(batch_norm=False)

    def magnitude(weight: float) -> float:
        loss = priors(target=1.0, activation=weight)
        made = method(targets=FeatureGaussian(deviation=2.0), priors=loss, steps=40).synthesize(teacher, 16, generator(), shape=SHAPE)
        return -priors(activation=1.0).bound(teacher, None)(made.images, None)["activation"].item()

    assert magnitude(10.0) > 1.05 * magnitude(0.0)


def test_an_image_does_not_depend_on_who_shares_its_batch() -> None:
    """Same targets and noise in one batch of 16 or two of 8: only the noise's order of drawing is the same, so the images are too."""
    one, two = (method(batch_size=size).synthesize(small_model(), 16, generator(), shape=SHAPE) for size in (16, 8))
    torch.testing.assert_close(one.images, two.images, atol=1e-3, rtol=0)


def test_every_batch_mixes_the_classes() -> None:
    """In the order of drawing the first eight images would all be of one class."""
    made = method(betas=(1.0,), steps=1).synthesize(small_model(), 8 * CLASSES, generator(), shape=SHAPE)
    assert len(made.labels[:8].unique()) > 1 and torch.bincount(made.labels).tolist() == [8] * CLASSES


def test_as_released_goes_on_from_the_batch_before() -> None:
    """One row, two batches of 4: the second batch starts where the first ended, so one step moves it by about lr."""
    teacher = Linear([[1.0, -1.0, 0.5, 2.0], [-1.0, 1.0, 1.0, 0.5]])
    one = method(variant="as_released", betas=(1.0,), steps=1, lr=1e-4, batch_size=4)
    made = one.synthesize(teacher, 16, generator(), shape=(1, 2, 2))  # 2 rows x 8 images = 2 batches each
    assert float((made.images[0:4] - made.images[4:8]).abs().max()) < 1e-2
    assert float((made.images[4:8] - made.images[8:12]).abs().max()) > 1e-1  # the next row starts from new noise
    for batch in made.images.split(4):  # rescaled by its extremes as a whole
        assert float(batch.min()) == 0 and float(batch.max()) == 1


def test_as_released_starts_from_new_noise_after_a_batch_that_diverges() -> None:
    """Four rows of two batches of two steps; the first batch fails: answer 1 counts the classes, 2 is the first step."""
    one = method(variant="as_released", betas=(1.0,), steps=2, batch_size=4)
    assert len(one.synthesize(Faulty(2, 2), 32, generator(), shape=SHAPE)) == 28


@pytest.mark.parametrize(
    ("change", "key"),
    [({"batch_size": 0}, "batch_size"), ({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"temperature": 0.0}, "temperature"),
     ({"variant": "x"}, "variant")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        method(**change)


def test_a_teacher_without_a_final_layer_or_with_nan_is_refused() -> None:
    with pytest.raises(TeacherError, match="no linear layer"):
        method().synthesize(torch.nn.Sequential(torch.nn.Flatten()), 4, generator(), shape=(1, 2, 2))
    with pytest.raises(TeacherError, match="not finite"):
        method().synthesize(Linear([[float("inf"), 1.0], [1.0, 0.0]]), 4, generator(), shape=(1, 1, 2))
