"""Target samplers: what the teacher is asked to see, drawn from what it is made of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.synthesis.targets import LEAST_CONCENTRATION, ClassSimilarity, FeatureGaussian, OneHot, class_similarity, concentrations
from tests.makers import CLASSES, SHAPE, Linear, small_ensemble, small_model

# Three classes in the plane: 0 and 1 at 45 degrees, 0 and 2 at 180, 1 and 2 at 135. Lengths must not matter.
PLANE = [[1.0, 0.0], [3.0, 3.0], [-2.0, 0.0]]
HALF = math.sqrt(0.5)
PAIR = (1, 1, 2)  # images of two pixels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Dirichlet distributions over similar classes


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
        torch.testing.assert_close(concentrations(similarity, beta, "matrix"), (beta * scaled).clamp_min(LEAST_CONCENTRATION))
    # Row by row: in row 1 the least similarity is -HALF, so class 0 gets (HALF + HALF) / (1 + HALF).
    released = concentrations(similarity, 0.1, "rows")
    assert torch.equal(released, concentrations(similarity, 1.0, "rows"))
    assert released[1, 0].item() == pytest.approx(2 * HALF / (1 + HALF))
    assert released[1, 2].item() == pytest.approx(LEAST_CONCENTRATION)


@pytest.mark.parametrize("scaling", ["matrix", "rows"])
def test_classes_that_are_all_alike_have_finite_concentrations(scaling: str) -> None:
    assert concentrations(torch.ones(3, 3, dtype=torch.float64), 1.0, scaling).unique().tolist() == [LEAST_CONCENTRATION]


@given(
    weights=st.integers(2, 6).flatmap(
        lambda classes: st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=classes, max_size=classes)
    ),
    betas=st.lists(st.floats(0.01, 10), min_size=1, max_size=3),
    scaling=st.sampled_from(["matrix", "rows"]),
    count=st.integers(1, 40),
)
def test_targets_are_distributions_and_shared_evenly_by_classes_and_betas(
    weights: list[list[float]], betas: list[float], scaling: str, count: int
) -> None:
    drawn = ClassSimilarity(betas=tuple(betas), scaling=scaling).draw(Linear(weights), count, (1, 1, 3), 20.0, generator())
    classes = len(weights)
    torch.testing.assert_close(drawn.distributions.sum(1), torch.ones(count))
    assert drawn.distributions.shape == (count, classes) and float(drawn.distributions.min()) >= 0
    assert len(drawn.rows) == classes * len(betas) and sum(drawn.rows) == count and max(drawn.rows) - min(drawn.rows) <= 1
    expected = [row % classes for row, share in enumerate(drawn.rows) for _ in range(share)]
    assert drawn.labels.tolist() == expected


@pytest.mark.parametrize("scaling", ["matrix", "rows"])
def test_targets_have_the_dirichlet_mean(scaling: str) -> None:
    """The mean of Dir(a) is m = a / sum(a), and the variance of an entry m (1 - m) / (sum(a) + 1); five deviations of the mean of 2000
    draws are allowed.
    """
    scaled = {
        "matrix": [[1, (HALF + 1) / 2, 0], [(HALF + 1) / 2, 1, (1 - HALF) / 2], [0, (1 - HALF) / 2, 1]],
        "rows": [[1, (HALF + 1) / 2, 0], [2 * HALF / (1 + HALF), 1, 0], [0, (1 - HALF) / 2, 1]],
    }[scaling]
    drawn = ClassSimilarity(betas=(0.1, 1.0), scaling=scaling).draw(Linear(PLANE), 12000, PAIR, 20.0, generator())
    assert drawn.rows == [2000] * 6 and torch.bincount(drawn.labels).tolist() == [4000] * 3
    for row, part in enumerate(drawn.distributions.double().split(drawn.rows)):
        beta = 1.0 if scaling == "rows" else (0.1, 1.0)[row // 3]
        alpha = (beta * torch.tensor(scaled[row % 3], dtype=torch.float64)).clamp_min(LEAST_CONCENTRATION)
        mean = alpha / alpha.sum()
        deviation = (mean * (1 - mean) / (alpha.sum() + 1) / 2000).sqrt()
        assert ((part.mean(0) - mean).abs() < 5 * deviation).all()


def test_a_small_beta_gives_peaked_targets() -> None:
    spread, peaked = (
        ClassSimilarity(betas=(beta,), scaling="matrix").draw(Linear(PLANE), 3000, PAIR, 20.0, generator()).distributions.amax(1).mean()
        for beta in (1.0, 0.1)
    )
    assert peaked > spread + 0.05


# One class


def test_one_hot_targets_share_the_images_evenly() -> None:
    drawn = OneHot().draw(small_ensemble(), 10, SHAPE, 20.0, generator())
    assert drawn.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3] and drawn.rows == [3, 3, 2, 2]
    assert torch.equal(drawn.distributions, torch.eye(CLASSES)[drawn.labels])


# A Gaussian in a feature space

MIX = torch.tensor([[2.0, 1.0], [1.0, 1.0]])  # determinant 1


def final() -> nn.Linear:
    """Three logits of two features; the third logit is 0, so that softmaxes can be undone."""
    layer = nn.Linear(2, 3)
    layer.weight.data = torch.cat([MIX, torch.zeros(1, 2)])
    layer.bias.data = torch.tensor([0.3, -0.2, 0.0])
    return layer


def features_of(distributions: Tensor) -> Tensor:
    """The features that :func:`final` made distributions of, (N, 2)."""
    logits = (distributions[:, :2] / distributions[:, 2:]).log() - torch.tensor([0.3, -0.2])
    return logits @ torch.linalg.inv(MIX).T


def two_units(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    return layer


def assert_normal(features: Tensor, mean: list[float], covariance: Tensor) -> None:
    """The means of n draws deviate by sigma / sqrt n, their covariances by less than sigma^2 sqrt(2 / n): five of each are allowed."""
    n, largest = len(features), covariance.diagonal().max().item()
    torch.testing.assert_close(features.mean(0), torch.tensor(mean), atol=5 * math.sqrt(largest / n), rtol=0)
    torch.testing.assert_close(features.T.cov(), covariance, atol=5 * largest * math.sqrt(2 / n), rtol=0)


def test_samples_have_the_bias_as_mean_and_the_cosines_of_the_units_as_correlations() -> None:
    """Units (1, 0) and (3, 3) are at 45 degrees."""
    teacher = nn.Sequential(nn.Flatten(), two_units([[1.0, 0.0], [3.0, 3.0]], [1.0, -2.0]), final())
    drawn = FeatureGaussian(deviation=0.5).draw(teacher, 20000, PAIR, 1.0, generator())
    assert_normal(features_of(drawn.distributions), [1.0, -2.0], 0.25 * torch.tensor([[1.0, HALF], [HALF, 1.0]]))
    assert torch.equal(drawn.labels, drawn.distributions.argmax(1)) and drawn.rows == [20000]
    assert len(drawn.labels.unique()) > 1


def test_the_temperature_softens_the_answers() -> None:
    teacher = nn.Sequential(nn.Flatten(), two_units([[1.0, 0.0], [3.0, 3.0]], [1.0, -2.0]), final())
    hard, soft = (FeatureGaussian(deviation=0.5).draw(teacher, 5, PAIR, tau, generator()).distributions for tau in (1.0, 4.0))
    torch.testing.assert_close(soft, (hard.log() / 4).softmax(1))


def test_units_of_one_direction_are_drawn_together() -> None:
    """Their correlation is 1 and the matrix of cosines singular."""
    teacher = nn.Sequential(nn.Flatten(), two_units([[1.0, 2.0], [2.0, 4.0]], [0.0, 0.0]), final())
    features = features_of(FeatureGaussian(deviation=0.5).draw(teacher, 50, PAIR, 1.0, generator()).distributions)
    torch.testing.assert_close(features[:, 0], features[:, 1], atol=1e-4, rtol=0)
    assert features.std() > 0.3


def remembering(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """A batch norm that remembers means 5 and -5 and variances 4 and 9, and gives back normalised values as they are."""
    norm.running_mean, norm.running_var, norm.eps = torch.tensor([5.0, -5.0]), torch.tensor([4.0, 9.0]), 0.0
    return norm.eval()


def test_batch_norm_scales_the_samples() -> None:
    """Units at 90 degrees; drawn on the running means and deviations, so the bias plays no part and batch norm gives N(0, 1/4)."""
    units = two_units([[1.0, 0.0], [0.0, 2.0]], [100.0, 100.0])
    teacher = nn.Sequential(nn.Flatten(), units, remembering(nn.BatchNorm1d(2)), final())
    drawn = FeatureGaussian(deviation=0.5).draw(teacher, 20000, PAIR, 1.0, generator())
    assert_normal(features_of(drawn.distributions), [0.0, 0.0], 0.25 * torch.eye(2))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_samples_of_a_convolution_are_the_same_at_every_position(batch_norm: bool) -> None:
    """Filters ((1, 1), (1, 1)) and ((1, 0), (0, 0)) have the cosine 1 / 2. The mean over 3x4 positions that are all the same is what was
    drawn, and so is their maximum.
    """
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)):
        convolution = nn.Conv2d(1, 2, 2)
        convolution.weight.data = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[1.0, 0.0], [0.0, 0.0]]]])
        convolution.bias.data = torch.tensor([1.0, 0.5])
        norm = [remembering(nn.BatchNorm2d(2))] if batch_norm else []
        teacher = nn.Sequential(convolution, *norm, pool, nn.Flatten(), final())
        drawn = FeatureGaussian(deviation=0.5).draw(teacher, 20000, (1, 4, 5), 1.0, generator())
        mean = [0.0, 0.0] if batch_norm else [1.0, 0.5]
        assert_normal(features_of(drawn.distributions), mean, 0.25 * torch.tensor([[1.0, 0.5], [0.5, 1.0]]))


def test_an_ensemble_answers_member_by_member() -> None:
    """One member always says 0, the other 1; of five targets the first has three."""
    members = []
    for voice in ([50.0, 0.0, 0.0], [0.0, 50.0, 0.0]):
        last = final()
        last.bias.data = torch.tensor(voice)
        members.append(nn.Sequential(nn.Flatten(), two_units([[1.0, 0.0], [3.0, 3.0]], [0.0, 0.0]), last))
    drawn = FeatureGaussian(deviation=0.5).draw(Ensemble(members), 5, PAIR, 1.0, generator())
    assert drawn.labels.tolist() == [0, 0, 0, 1, 1] and drawn.rows == [5]
    assert FeatureGaussian(deviation=0.5).draw(Ensemble(members), 1, PAIR, 1.0, generator()).labels.tolist() == [0]


@pytest.mark.parametrize("teacher", [small_model(), small_model(batch_norm=False), small_ensemble()])
def test_sampling_leaves_no_hook(teacher: nn.Module) -> None:
    FeatureGaussian(deviation=2.0).draw(teacher, 7, SHAPE, 20.0, generator())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_teacher_of_one_layer_is_refused() -> None:
    with pytest.raises(TeacherError, match="no layer before its final one"):
        FeatureGaussian(deviation=1.0).draw(Linear(PLANE), 4, PAIR, 1.0, generator())


@pytest.mark.parametrize("sampler", [ClassSimilarity(betas=(0.1, 1.0), scaling="matrix"), OneHot(), FeatureGaussian(deviation=2.0)])
def test_same_seed_same_targets_whatever_the_global_state(sampler) -> None:
    drawn = []
    for _ in range(2):
        torch.rand(3)
        drawn.append(sampler.draw(small_model(), 20, SHAPE, 20.0, generator()))
    assert all(torch.equal(one, two) for one, two in zip(drawn[0][:2], drawn[1][:2], strict=True))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ClassSimilarity(betas=(), scaling="matrix"), "betas"),
        (lambda: ClassSimilarity(betas=(1.0, 0.0), scaling="matrix"), "betas"),
        (lambda: ClassSimilarity(betas=(1.0,), scaling="columns"), "scaling"),
        (lambda: FeatureGaussian(deviation=0.0), "deviation"),
    ],
)
def test_settings_out_of_range_are_refused(make, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make()
