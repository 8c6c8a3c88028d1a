"""SHOT: information maximisation and pseudo-labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy

from fedimpr.adaptation import information_loss, pseudo_labels
from fedimpr.errors import ConfigError, FedimprError

SURE = 50.0


def table(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answers(*classes: int, count: int = 3) -> torch.Tensor:
    """Logits that are certain of these classes."""
    return SURE * torch.eye(count)[list(classes)]


# Information maximisation


def test_the_loss_is_least_where_each_answer_is_certain_and_all_are_given_equally_often() -> None:
    assert information_loss(answers(0, 1, 2)).item() == pytest.approx(-math.log(3))


def test_one_certain_answer_for_all_images_is_no_better_than_a_guess() -> None:
    """Entropy 0 minus entropy 0, and ln 3 minus ln 3."""
    assert information_loss(answers(1, 1)).item() == pytest.approx(0, abs=1e-6)
    assert information_loss(torch.zeros(4, 3)).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_that_of_scipys_entropies() -> None:
    logits = table(6, 4)
    predicted = softmax(logits.numpy(), axis=1)
    assert information_loss(logits).item() == pytest.approx(entropy(predicted, axis=1).mean() - entropy(predicted.mean(0)))


@given(st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_loss_lies_between_minus_ln_k_and_zero(rows: list[list[float]]) -> None:
    assert -math.log(3) - 1e-9 <= information_loss(torch.tensor(rows, dtype=torch.float64)).item() <= 1e-9


def test_slopes_of_the_loss() -> None:
    assert torch.autograd.gradcheck(information_loss, table(4, 3).requires_grad_())


# Pseudo-labels


def looped(features: np.ndarray, logits: np.ndarray, at_least: int, steps: int = 2) -> np.ndarray:
    """By SciPy's cosine distance, class by class."""
    points = np.hstack([features, np.ones((len(features), 1))])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    predicted = softmax(logits, axis=1)
    kept = [k for k in range(logits.shape[1]) if (logits.argmax(1) == k).sum() >= at_least]
    shares = {k: predicted[:, k] for k in kept}
    for _ in range(steps):
        centroids = {k: np.average(points, axis=0, weights=share) for k, share in shares.items() if share.sum() > 0}
        names = np.array(list(centroids))
        labels = names[cdist(points, np.stack(list(centroids.values())), "cosine").argmin(1)]
        shares = {k: (labels == k).astype(float) for k in kept}
    return labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("at_least", [1, 4])
def test_pseudo_labels_are_those_of_scipy(seed: int, at_least: int) -> None:
    features, logits = table(30, 4, seed), 2 * table(30, 6, seed + 100)
    found = pseudo_labels(features, logits, at_least=at_least)
    assert found.dtype == torch.int64
    assert found.tolist() == looped(features.numpy(), logits.numpy(), at_least).tolist()


def test_an_image_among_those_of_another_class_is_given_that_class() -> None:
    """Five images point one way and five another; the model is wrong about one of each."""
    features = torch.tensor([[10.0, 0.1]] * 5 + [[0.1, 10.0]] * 5)
    logits = answers(0, 0, 0, 0, 1, 1, 1, 1, 1, 0, count=2)
    assert pseudo_labels(features, logits, at_least=1).tolist() == [0] * 5 + [1] * 5


def test_the_centroids_are_refined_once() -> None:
    """No refinement would give other labels, and so would a second one."""
    features, logits = table(30, 4), 2 * table(30, 6, 100)
    found = pseudo_labels(features, logits, at_least=1).tolist()
    none, once, twice = (looped(features.numpy(), logits.numpy(), 1, steps=steps).tolist() for steps in (1, 2, 3))
    assert none != once != twice and found == once


def test_classes_that_are_answered_too_rarely_are_given_to_no_image() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]])
    logits = answers(0, 0, 2, 2, 1)
    assert pseudo_labels(features, logits, at_least=1).tolist() == [0, 0, 2, 2, 1]
    assert set(pseudo_labels(features, logits, at_least=2).tolist()) == {0, 2}


def test_a_centroid_that_lost_its_images_is_nearest_to_none() -> None:
    """The model answers 1 for the first image only, barely, and that image is nearest to the centroid of 2.

    So 1 has no image to refine its centroid by. The second image then points away from the centroids of 0 and 2: to a centroid of nothing,
    whose cosine is 0, it would be nearer.
    """
    features = torch.tensor([[-2.0, 2.0], [2.0, 0.0], [-2.0, 0.0], [-2.0, -2.0], [-4.0, -2.0]], dtype=torch.float64)
    logits = [[-3.0, -0.9, -1.0], [0.0, -1.0, -2.0], [2.0, 2.0, 3.0], [0.0, -1.0, -6.0], [2.0, -2.0, 1.0]]
    assert pseudo_labels(features, torch.tensor(logits, dtype=torch.float64), at_least=1).tolist() == [2, 0, 2, 0, 0]


@given(st.permutations(range(8)))
def test_pseudo_labels_follow_their_images(order: list[int]) -> None:
    features, logits = table(8, 3), 3 * table(8, 3, 1)
    found = pseudo_labels(features, logits, at_least=1)
    assert torch.equal(pseudo_labels(features[order], logits[order], at_least=1), found[order])


def test_images_without_any_feature_still_get_a_label() -> None:
    assert pseudo_labels(torch.zeros(2, 3), answers(1, 1), at_least=1).tolist() == [1, 1]


# Bad input


def test_tables_of_other_shapes_are_refused() -> None:
    with pytest.raises(FedimprError, match=r"information maximisation: logits must be \(N, D\) with N >= 1 \(value \(3,\)\)"):
        information_loss(torch.zeros(3))
    with pytest.raises(FedimprError, match=r"pseudo-labels: features must be .* \(value \(2, 1, 4, 4\)\)"):
        pseudo_labels(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3), at_least=1)
    with pytest.raises(FedimprError, match=r"pseudo-labels: features must be .* \(value \(0, 4\)\)"):
        pseudo_labels(torch.zeros(0, 4), torch.zeros(0, 3), at_least=1)
    with pytest.raises(FedimprError, match=r"of the same images \(value \(4, 5\)\)"):
        pseudo_labels(torch.zeros(4, 2), torch.zeros(5, 3), at_least=1)


def test_a_bound_that_no_class_meets_is_refused_with_the_one_that_would_do() -> None:
    with pytest.raises(FedimprError, match=r"no class is answered for 3 images, only for up to 2\. Lower at_least\."):
        pseudo_labels(torch.zeros(3, 2), answers(0, 0, 1), at_least=3)
    with pytest.raises(ConfigError, match="at_least"):
        pseudo_labels(torch.zeros(3, 2), answers(0, 0, 1), at_least=0)
