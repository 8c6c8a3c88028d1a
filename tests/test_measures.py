"""Measures of a transfer set, against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.errors import FedimprError, TeacherError
from fedimpr.measures import (
    confidence,
    coverage,
    describe,
    drawn,
    effective_number,
    features_of,
    frechet_distance,
    label_fidelity,
    mean_distance,
)
from tests.makers import SHAPE, Linear, small_ensemble, small_model

TWO = {"label_fidelity", "confidence"}
FOUR = TWO | {"mean_distance", "effective_number"}
SIX = FOUR | {"coverage", "frechet_distance"}


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=seeds.generator(seed, "features"), dtype=torch.float64)


SETS = st.builds(noise, st.integers(2, 12), st.just(5), st.integers(0, 99))  # fewer and more images than the 5 features


def test_label_fidelity_is_the_share_of_wanted_classes_that_win() -> None:
    logits = rows([1, 0], [0, 1], [2, 1], [5, 9])  # the classes 0, 1, 0, 1 win
    assert label_fidelity(logits, torch.tensor([0, 1, 1, 1])) == 3 / 4


def test_confidence_is_the_mean_of_the_largest_probabilities() -> None:
    # softmax(0, 0) = (1/2, 1/2); softmax(ln 3, 0) = (3, 1) / 4. Their largest: 1/2 and 3/4.
    assert confidence(rows([0, 0], [math.log(3), 0])) == pytest.approx((1 / 2 + 3 / 4) / 2)


def test_mean_distance_is_over_distinct_pairs() -> None:
    # The sides of a right triangle: 3, 4, 5.
    assert mean_distance(rows([0, 0], [3, 0], [0, 4])) == pytest.approx((3 + 4 + 5) / 3)
    assert math.isnan(mean_distance(rows([1, 2])))


def test_mean_distance_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = noise(11, 3)
    pairs = [float((features[i] - features[j]).norm()) for i in range(11) for j in range(i)]
    for block in (1, 4, 11):
        monkeypatch.setattr("fedimpr.measures.ROWS", block)
        assert mean_distance(features) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([[1, 0], [0, 5]], 2),  # orthogonal, whatever their lengths
        ([[1, 2], [1, 2], [3, 6]], 1),  # all point one way
        ([[1, 0], [1, 0], [0, 1], [0, 1]], 2),  # two pairs
        # Cosine 1/2 between two: K / 2 has the eigenvalues (1 +- 1/2) / 2 = 3/4 and 1/4.
        ([[1, 0], [1, math.sqrt(3)]], math.exp(-(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4)))),
        ([[0, 0], [0, 0]], 1),  # zeros are alike ...
        ([[0, 0], [1, 0], [0, 1]], 3),  # ... and unlike all others
    ],
)
def test_effective_number_of_sets_known_by_hand(features: list[list[float]], expected: float) -> None:
    assert effective_number(rows(*features)) == pytest.approx(expected)


@given(features=SETS)
def test_effective_number_lies_between_one_and_all_whatever_the_order_the_scale_and_the_shape(features: Tensor) -> None:
    number = effective_number(features)
    assert 1 - 1e-9 <= number <= len(features) + 1e-9
    assert effective_number(features.flip(0)) == pytest.approx(number)
    assert effective_number(features * 7) == pytest.approx(number)
    # Features that are always zero change no cosine, but there are now more of them than images.
    assert effective_number(torch.cat([features, features.new_zeros(len(features), 20)], 1)) == pytest.approx(number)


def test_coverage_counts_real_images_with_a_made_one_in_their_ball() -> None:
    real = rows([0], [1], [3], [10])  # to the nearest other one: 1, 1, 2, 7
    assert coverage(real, rows([0.5]), 1) == 2 / 4  # those at 0 and 1
    assert coverage(real, rows([2]), 1) == 2 / 4  # at 1, on the edge of its ball, and at 3
    assert coverage(real, rows([4], [20]), 1) == 2 / 4  # at 3, and at 10, which is 6 away
    assert coverage(real, rows([2.5]), 1) == 1 / 4  # at 3
    assert coverage(real, rows([2.5]), 2) == 1  # to the second nearest: 3, 2, 3, 9; the made one is 2.5, 1.5, 0.5 and 7.5 away


def test_coverage_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = noise(13, 3), noise(7, 3, 1)
    whole = coverage(real, made, 2)
    assert 0 < whole < 1
    monkeypatch.setattr("fedimpr.measures.ROWS", 4)
    assert coverage(real, made, 2) == whole


@pytest.mark.parametrize("neighbours", [0, 3])
def test_coverage_needs_more_real_images_than_neighbours(neighbours: int) -> None:
    with pytest.raises(FedimprError, match=rf"3 real images needs 1 to 2 neighbours \(value {neighbours}\)"):
        coverage(noise(3, 2), noise(3, 2), neighbours)


def test_frechet_distance_of_one_feature_is_worked_out_by_hand() -> None:
    # Means 2 and 6; sample variances (4 + 0 + 4) / 2 = 4 and (1 + 1) / 1 = 2.
    expected = (2 - 6) ** 2 + 4 + 2 - 2 * math.sqrt(4 * 2)
    assert frechet_distance(rows([0], [2], [4]), rows([5], [7])) == pytest.approx(expected)


def test_frechet_distance_of_single_images_is_their_squared_distance() -> None:
    assert frechet_distance(rows([0, 0]), rows([3, 4])) == pytest.approx(3**2 + 4**2)


@given(real=SETS, made=SETS)
def test_frechet_distance_is_what_the_covariances_give_with_many_or_few_images(real: Tensor, made: Tensor) -> None:
    """Against the formula as it is written: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))."""
    one, two = real.T.cov(), made.T.cov()
    # The root of a matrix has the roots of its eigenvalues; near 0 they are only good to the root of the precision.
    roots = torch.linalg.eigvals(one @ two).real.clamp_min(0).sqrt()
    expected = (real.mean(0) - made.mean(0)).square().sum() + one.trace() + two.trace() - 2 * roots.sum()
    distance = frechet_distance(real, made)
    assert distance == pytest.approx(float(expected), abs=1e-5)
    assert distance >= 0 and frechet_distance(made, real) == pytest.approx(distance)
    # Features that are always zero change nothing, but there are now more of them than images.
    wide = [torch.cat([features, features.new_zeros(len(features), 20)], 1) for features in (real, made)]
    assert frechet_distance(*wide) == pytest.approx(distance)
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-12)


def test_a_choice_of_images_is_fixed_ascending_and_of_different_ones() -> None:
    assert drawn(3, 5).tolist() == [0, 1, 2]
    chosen = drawn(100, 20)
    assert len(set(chosen.tolist())) == 20 and torch.equal(chosen, chosen.sort().values) and torch.equal(chosen, drawn(100, 20))
    assert len(set((drawn(1000, 100) % 10).tolist())) == 10  # every tenth image would show one class of ten


def test_features_are_what_the_final_layer_sees_and_an_ensemble_has_all_of_its_members() -> None:
    teacher, images = small_ensemble(2), torch.rand(5, *SHAPE, generator=seeds.generator(0, "images"))
    seen = features_of(teacher, images, 2)
    layers = [list(member.modules())[-1] for member in teacher.members]
    parts = seen.features.split([layer.in_features for layer in layers], 1)
    rebuilt = sum(layer(part.float()) for layer, part in zip(layers, parts, strict=True)) / 2  # the mean of the members' logits
    torch.testing.assert_close(seen.logits, rebuilt)
    torch.testing.assert_close(seen.logits, teacher(images))
    assert seen.features.dtype == torch.float64


def test_a_description_holds_the_measures_of_the_teachers_features() -> None:
    teacher = Linear([[1.0, 0.0], [0.0, 1.0]])  # two pixels are two features, and two logits
    made, real = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0.0, 0], [1, 0], [1, 1]])
    pictures, reals = made.view(2, 1, 1, 2), real.view(3, 1, 1, 2)
    found = describe(teacher, pictures, torch.tensor([0, 0]), real=reals, limit=9, batch=2, neighbours=1)
    expected = {
        "label_fidelity": 1 / 2,
        "confidence": math.e / (math.e + 1),
        "mean_distance": math.sqrt(2),
        "effective_number": 2,
        "coverage": 1,  # each of the real ones has a neighbour 1 away, and a made one no farther
        "frechet_distance": frechet_distance(real.double(), made.double()),
    }
    assert found == pytest.approx(expected)


def test_without_real_images_there_is_nothing_to_compare_with() -> None:
    images = torch.rand(6, *SHAPE, generator=seeds.generator(0, "images"))
    assert describe(small_model(), images, torch.arange(6) % 4, real=None, limit=6, batch=4, neighbours=5).keys() == FOUR


def test_the_limit_holds_for_both_sets() -> None:
    teacher = Counting()
    images = torch.rand(50, 1, 2, 2, generator=seeds.generator(0, "images"))
    found = describe(teacher, images, torch.zeros(50, dtype=torch.int64), real=images, limit=8, batch=5, neighbours=2)
    assert teacher.seen == [5, 3, 5, 3]
    assert found.keys() == SIX and found["coverage"] == 1 and found["frechet_distance"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("why", ["no linear layer", "not finite"])
def test_a_teacher_without_usable_features_leaves_the_logits_measures(why: str) -> None:
    teacher: nn.Module = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    if why == "not finite":
        teacher = nn.Sequential(nn.Flatten(), Unbounded(), nn.Linear(8, 2))
    images = torch.rand(4, 2, 2, 2, generator=seeds.generator(0, "images"))
    with pytest.raises(TeacherError):
        features_of(teacher, images, 4)
    assert describe(teacher, images, torch.zeros(4, dtype=torch.int64), real=images, limit=4, batch=4, neighbours=1).keys() == TWO


def test_the_teacher_is_left_as_it_was_found() -> None:
    teacher = small_model().train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    images = torch.rand(6, *SHAPE, generator=seeds.generator(0, "images"))
    describe(teacher, images, torch.arange(6) % 4, real=images, limit=6, batch=4, neighbours=2)
    assert teacher.training and all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


class Counting(nn.Module):
    """A linear teacher that remembers the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 2), []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return self.layer(images.flatten(1))


class Unbounded(nn.Module):
    """Divides by zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.zeros_like(x)
