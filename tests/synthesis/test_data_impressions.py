"""Data impressions: every step of ZSKD's algorithm, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.synthesis import DataImpressions
from fedimpr.synthesis.data_impressions import LEAST_CONCENTRATION, class_similarity, concentrations
from fedimpr.views import Views
from tests.makers import SHAPE, Linear, small_model


def method(**changes) -> DataImpressions:
    settings = {"betas": (0.1, 1.0), "temperature": 20.0, "steps": 30, "lr": 0.05, "batch_size": 16, "variant": "text"}
    settings |= {"views": Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)}
    return DataImpressions(**{**settings, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Three classes in the plane: 0 and 1 at 45 degrees, 0 and 2 at 180, 1 and 2 at 135. Lengths must not matter.
PLANE = [[1.0, 0.0], [3.0, 3.0], [-2.0, 0.0]]
HALF = math.sqrt(0.5)


def test_class_similarity_is_the_cosine_of_the_final_layers_rows() -> None:
    expected = [[1, HALF, -1], [HALF, 1, -HALF], [-1, -HALF, 1]]
    torch.testing.assert_close(class_similarity(Linear(PLANE)), torch.tensor(expected, dtype=torch.float64))


def test_class_similarity_of_an_ensemble_is_that_of_its_final_layer() -> None:
    """Two members side by side: the rows are (1, 0 | 0, 1) and (0, 1 | 0, 1), halved; their cosine is (0 + 1) / (sqrt 2 * sqrt 2)."""
    one, two = Linear([[1.0, 0.0], [0.0, 1.0]]), Linear([[0.0, 1.0], [0.0, 1.0]])
    assert class_similarity(Ensemble([one, two]))[0, 1].item() == pytest.approx(0.5)
    # With weights 3 : 1 the rows are (3, 0 | 0, 1) / 4 and (0, 3 | 0, 1) / 4: cosine 1 / 10.
    assert class_similarity(Ensemble([one, two], torch.tensor([3.0, 1.0])))[0, 1].item() == pytest.approx(0.1)


def test_beta_acts_in_the_text_and_not_in_the_released_code() -> None:
    similarity = class_similarity(Linear(PLANE))  # from -1 to 1, so scaled to [0, 1] it is (s + 1) / 2
    scaled = torch.tensor([[1, (HALF + 1) / 2, 0], [(HALF + 1) / 2, 1, (1 - HALF) / 2], [0, (1 - HALF) / 2, 1]], dtype=torch.float64)
    for beta in (0.1, 1.0):
        torch.testing.assert_close(concentrations(similarity, beta, "text"), (beta * scaled).clamp_min(LEAST_CONCENTRATION))
    # Row by row: in row 1 the least similarity is -HALF, so class 0 gets (HALF + HALF) / (1 + HALF).
    released = concentrations(similarity, 0.1, "as_released")
    assert torch.equal(released, concentrations(similarity, 1.0, "as_released"))
    assert released[1, 0].item() == pytest.approx(2 * HALF / (1 + HALF))
    assert released[1, 2].item() == pytest.approx(LEAST_CONCENTRATION)


def test_targets_are_shared_evenly_by_classes_and_betas_and_have_the_dirichlet_mean() -> None:
    teacher = Linear(PLANE)
    targets, wanted = method().draw_targets(teacher, 6000, generator())
    assert torch.bincount(wanted).tolist() == [2000, 2000, 2000]
    torch.testing.assert_close(targets.sum(1), torch.ones(6000))
    for beta, rows in ((0.1, slice(0, 3000)), (1.0, slice(3000, 6000))):  # the mean of Dir(a) is a / sum(a)
        alpha = concentrations(class_similarity(teacher), beta, "text")
        for k in range(3):
            mean = targets[rows][wanted[rows] == k].mean(0).double()
            torch.testing.assert_close(mean, alpha[k] / alpha[k].sum(), atol=0.04, rtol=0)


def test_a_small_beta_gives_peaked_targets() -> None:
    spread, peaked = (method(betas=(beta,)).draw_targets(Linear(PLANE), 3000, generator())[0].amax(1).mean() for beta in (1.0, 0.1))
    assert peaked > spread + 0.05


def test_one_step_is_the_step_of_adam_on_the_softened_cross_entropy() -> None:
    """Adam's first step moves every pixel by lr against the sign of its gradient; then the image is projected to [0, 1].

    With logits z = W x the gradient of CE(y, softmax(z / tau)) with respect to x is W^T (softmax(z / tau) - y) / tau.
    """
    weight, tau, lr = torch.tensor([[2.0, -1.0], [-3.0, 1.0]]), 20.0, 0.1
    teacher, shape = Linear(weight.tolist()), (1, 1, 2)
    one = method(betas=(1.0,), temperature=tau, steps=1, lr=lr, batch_size=8)
    y, wanted = one.draw_targets(teacher, 8, source := generator(3))
    y = y[torch.randperm(8, generator=source)]
    start = torch.rand(8, *shape, generator=source)
    p = torch.softmax(start.flatten(1) @ weight.T / tau, 1)
    expected = (start.flatten(1) - lr * ((p - y) @ weight / tau).sign()).clamp(0, 1)
    made = one.synthesize(teacher, 8, generator(3), shape=shape)
    torch.testing.assert_close(made.images.flatten(1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.targets, torch.softmax(made.images.flatten(1) @ weight.T / tau, 1))


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


def test_an_image_does_not_depend_on_who_shares_its_batch() -> None:
    """Same targets and noise in one batch of 16 or two of 8: only the noise's order of drawing is the same, so the images are too."""
    one, two = (method(batch_size=size).synthesize(small_model(), 16, generator(), shape=SHAPE) for size in (16, 8))
    torch.testing.assert_close(one.images, two.images, atol=1e-3, rtol=0)


def test_as_released_goes_on_from_the_batch_before() -> None:
    """One row, two batches of 4: the second batch starts where the first ended, so one step moves it by about lr."""
    teacher = Linear([[1.0, -1.0, 0.5, 2.0], [-1.0, 1.0, 1.0, 0.5]])
    one = method(variant="as_released", betas=(1.0,), steps=1, lr=1e-4, batch_size=4)
    made = one.synthesize(teacher, 16, generator(), shape=(1, 2, 2))  # 2 rows x 8 images = 2 batches each
    assert float((made.images[0:4] - made.images[4:8]).abs().max()) < 1e-2
    assert float((made.images[4:8] - made.images[8:12]).abs().max()) > 1e-1  # the next row starts from new noise


@pytest.mark.parametrize(
    ("change", "key"),
    [({"betas": ()}, "betas"), ({"betas": (0.0,)}, "betas"), ({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"variant": "x"}, "variant")],
)
def test_settings_out_of_range_are_refused(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        method(**change)


def test_a_teacher_without_a_final_layer_or_with_nan_is_refused() -> None:
    with pytest.raises(TeacherError, match="no linear layer"):
        method().synthesize(torch.nn.Sequential(torch.nn.Flatten()), 4, generator(), shape=(1, 2, 2))
    with pytest.raises(TeacherError, match="not finite"):
        method().synthesize(Linear([[float("inf"), 1.0], [1.0, 0.0]]), 4, generator(), shape=(1, 1, 2))
