"""Distances between domains: values by hand and by plain loops, slopes against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.adaptation import MultiKernelMMD, coral, mmd
from fedimpr.errors import ConfigError, FedimprError

MULTIPLES = (0.25, 1.0, 4.0)


def features(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(rows: int, columns: int = 2) -> st.SearchStrategy[torch.Tensor]:
    row = st.lists(st.floats(-10, 10), min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=5).map(lambda values: torch.tensor(values, dtype=torch.float64))


def looped(source: np.ndarray, target: np.ndarray, bandwidths: list[float]) -> float:
    """The biased statistic, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        total = 0.0
        for x in a:
            for y in b:
                total += sum(math.exp(-((x - y) ** 2).sum() / width) for width in bandwidths) / len(bandwidths)
        return total / (len(a) * len(b))

    return mean(source, source) + mean(target, target) - 2 * mean(source, target)


# CORAL


def test_coral_by_hand() -> None:
    """Rows (0, 0), (2, 0) have covariance ((2, 0), (0, 0)); rows (0, 0), (2, 2) have ((2, 2), (2, 2)): 12 / (4 * 4)."""
    source, target = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    assert coral(source, target).item() == pytest.approx(12 / 16)


def test_coral_is_that_of_numpys_covariances() -> None:
    source, target = features(7, 4), 3 * features(5, 4, seed=1) + 1
    gap = np.cov(source.numpy(), rowvar=False) - np.cov(target.numpy(), rowvar=False)
    assert coral(source, target).item() == pytest.approx(np.linalg.norm(gap, "fro") ** 2 / (4 * 4**2))


def test_coral_of_a_single_feature_is_that_of_the_variances() -> None:
    """Variances 2 and 8: 36 / 4."""
    assert coral(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])).item() == pytest.approx(9)


def test_coral_does_not_see_where_a_domain_lies() -> None:
    assert coral(features(6, 3), features(6, 3) + 5).item() == pytest.approx(0)


@given(tables(2), tables(2))
def test_coral_is_symmetric_not_negative_and_zero_for_equal_domains(source: torch.Tensor, target: torch.Tensor) -> None:
    assert coral(source, target).item() == coral(target, source).item() >= 0
    assert coral(source, source.clone()).item() == 0


def test_coral_keeps_float32_where_networks_compute_in_less() -> None:
    source, target = features(6, 3).float(), features(6, 3, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = coral(source, target)
    assert torch.equal(inside, coral(source, target))


def test_slopes_of_coral_reach_both_domains() -> None:
    assert torch.autograd.gradcheck(coral, (features(4, 3).requires_grad_(), features(5, 3, seed=1).requires_grad_()))


# MMD


def test_mmd_by_hand() -> None:
    """Points 0 and 2 against the point 1, bandwidth 1: (2 + 2 exp(-4)) / 4 + 1 - 2 exp(-1)."""
    value = mmd(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]]), torch.tensor([1.0]))
    assert value.item() == pytest.approx((1 + math.exp(-4)) / 2 + 1 - 2 * math.exp(-1))


def test_mmd_is_that_of_plain_loops_for_domains_of_unlike_sizes() -> None:
    source, target, widths = features(6, 3), features(4, 3, seed=1) + 0.5, [0.5, 2.0, 7.0]
    expected = looped(source.numpy(), target.numpy(), widths)
    assert mmd(source, target, torch.tensor(widths, dtype=torch.float64)).item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", ["median", "mean"])
def test_bandwidths_follow_the_squared_distances_between_different_images(scale: str) -> None:
    source, target = features(5, 3), features(4, 3, seed=1)
    rows = torch.cat([source, target]).numpy()
    squares = sorted(((rows[i] - rows[j]) ** 2).sum() for i in range(9) for j in range(i))  # 36 pairs
    expected = squares[17] if scale == "median" else sum(squares) / 36
    loss = MultiKernelMMD(multiples=MULTIPLES, scale=scale)
    assert loss.bandwidths(source, target).tolist() == pytest.approx([m * expected for m in MULTIPLES])
    widths = [m * expected for m in MULTIPLES]
    assert loss(source, target).item() == pytest.approx(looped(source.numpy(), target.numpy(), widths))


@pytest.mark.parametrize("scale", ["median", "mean"])
def test_mmd_does_not_depend_on_the_unit_of_the_features(scale: str) -> None:
    loss = MultiKernelMMD(multiples=MULTIPLES, scale=scale)
    source, target = features(5, 3), features(5, 3, seed=1) + 1
    assert loss(100 * source, 100 * target).item() == pytest.approx(loss(source, target).item())


@given(tables(1), tables(1), st.sampled_from(["median", "mean"]))
def test_mmd_is_symmetric_not_negative_and_zero_for_equal_domains(source: torch.Tensor, target: torch.Tensor, scale: str) -> None:
    loss = MultiKernelMMD(multiples=MULTIPLES, scale=scale)
    assert loss(source, target).item() == pytest.approx(loss(target, source).item(), abs=1e-12)
    assert loss(source, target).item() >= -1e-12
    assert loss(source, source.clone()).item() == pytest.approx(0, abs=1e-12)


def test_mmd_is_nearly_its_largest_value_for_domains_far_apart() -> None:
    """Two points of each domain in one place: 1 + 1 - 2 exp(-d / b), d the distance and b the mean over the 6 pairs, 4 d / 6."""
    loss = MultiKernelMMD(multiples=(1.0,), scale="mean")
    assert loss(torch.zeros(2, 3), torch.full((2, 3), 9.0)).item() == pytest.approx(2 - 2 * math.exp(-1.5))


def test_slopes_of_mmd_reach_both_domains() -> None:
    widths = torch.tensor([0.5, 2.0], dtype=torch.float64)
    pair = (features(4, 3).requires_grad_(), features(3, 3, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: mmd(s, t, widths), pair)


def test_no_gradient_flows_through_the_scale() -> None:
    loss, target = MultiKernelMMD(multiples=MULTIPLES, scale="mean"), features(4, 3, seed=1)
    one, other = features(5, 3).requires_grad_(), features(5, 3).requires_grad_()
    loss(one, target).backward()
    mmd(other, target, loss.bandwidths(other.detach(), target)).backward()
    assert torch.equal(one.grad, other.grad) and one.grad.abs().max() > 0


@pytest.mark.parametrize("scale", ["median", "mean"])
def test_domains_that_are_one_point_have_no_distance_and_a_finite_slope(scale: str) -> None:
    source = torch.ones(3, 2).requires_grad_()
    value = MultiKernelMMD(multiples=MULTIPLES, scale=scale)(source, torch.ones(3, 2))
    value.backward()
    assert value.item() == 0 and source.grad.abs().max().item() == 0


# Bad input


@pytest.mark.parametrize("loss", [coral, MultiKernelMMD(multiples=(1.0,), scale="mean")])
def test_domains_with_unlike_features_are_refused(loss) -> None:
    with pytest.raises(FedimprError, match=r"target features must be \(N, 3\) with N >= \d \(value \(4, 2\)\)"):
        loss(features(4, 3), features(4, 2))
    with pytest.raises(FedimprError, match=r"source features must be \(N, D\).*\(value \(2, 1, 4, 4\)\)"):
        loss(torch.zeros(2, 1, 4, 4), features(4, 2))


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(FedimprError, match=r"CORAL: target features must be \(N, 3\) with N >= 2 \(value \(1, 3\)\)"):
        coral(features(4, 3), features(1, 3))


@pytest.mark.parametrize(("key", "value"), [("multiples", ()), ("multiples", (1.0, 0.0)), ("scale", "mode")])
def test_settings_out_of_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        MultiKernelMMD(**{"multiples": (1.0,), "scale": "mean", key: value})
