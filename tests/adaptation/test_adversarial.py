"""Gradient reversal, the discriminator, DANN and CDAN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import entropy
from torch import nn

from fedimpr.adaptation import Discriminator, cdan, certainty, dann, multilinear, reversal_strength, reverse
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.observation import Observation

LN3 = math.log(3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seen(rows: int, seed: int = 0, *, features: int = 3, classes: int = 2) -> Observation:
    random = generator(seed)
    return Observation(
        torch.randn(rows, classes, generator=random, dtype=torch.float64),
        torch.zeros(2, 0),
        torch.randn(rows, features, generator=random, dtype=torch.float64),
    )


def of(features: list[list[float]], logits: list[list[float]] | None = None) -> Observation:
    given_logits = torch.zeros(len(features), 2) if logits is None else torch.tensor(logits)
    return Observation(given_logits, torch.zeros(2, 0), torch.tensor(features))


class Weighted(nn.Module):
    """A discriminator whose logit is a weighted sum of its inputs."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.double() @ self.weights


# Reversal


@given(st.floats(0, 1), st.floats(0.1, 50))
def test_the_strength_is_that_of_the_paper(progress: float, gamma: float) -> None:
    assert reversal_strength(progress, gamma) == pytest.approx(2 / (1 + math.exp(-gamma * progress)) - 1, abs=1e-12)


def test_the_strength_grows_from_zero_towards_one() -> None:
    strengths = [reversal_strength(done / 10, 10.0) for done in range(11)]
    assert strengths[0] == 0 and strengths == sorted(strengths) and 0.9999 < strengths[10] < 1


def test_reversal_keeps_the_value_and_turns_and_scales_the_gradient() -> None:
    """The slope of 3 x is 3; reversed with strength 0.5 it is -1.5."""
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse(x, 0.5)
    assert torch.equal(y, x)
    (3 * y).sum().backward()
    assert x.grad.tolist() == [-1.5, -1.5]


def test_a_strength_of_minus_one_is_the_identity_for_gradients_too() -> None:
    x = torch.randn(3, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: reverse(z, -1.0), x)


# The discriminator


def test_a_discriminator_answers_one_logit_an_image_and_is_decided_by_its_generator() -> None:
    inputs = torch.randn(4, 3, generator=generator())
    before = torch.random.get_rng_state()
    one, again, other = (Discriminator(3, (5, 6), generator(seed)) for seed in (0, 0, 1))
    assert one(inputs).shape == (4,)
    assert torch.equal(one(inputs), again(inputs)) and not torch.equal(one(inputs), other(inputs))
    assert torch.equal(before, torch.random.get_rng_state())
    assert [layer.out_features for layer in one.layers if isinstance(layer, nn.Linear)] == [5, 6, 1]


def test_a_discriminator_without_hidden_layers_is_linear() -> None:
    linear = Discriminator(3, (), generator())
    weight, bias = (p.detach() for p in linear.parameters())
    inputs = torch.randn(4, 3, generator=generator())
    assert torch.allclose(linear(inputs), inputs @ weight[0] + bias)


def test_a_discriminator_learns_to_tell_two_domains() -> None:
    """Sources near 1, targets near -1; after training the loss is far below that of guessing, 2 ln 2."""
    noise = 0.1 * torch.randn(2, 20, 2, generator=generator())
    source, target = (Observation(torch.zeros(20, 2), torch.zeros(2, 0), part) for part in (noise[0] + 1, noise[1] - 1))
    discriminator = Discriminator(2, (8,), generator())
    optimizer = torch.optim.Adam(discriminator.parameters(), 0.05)
    for _ in range(30):
        optimizer.zero_grad()
        dann(discriminator, source, target, strength=1.0).backward()
        optimizer.step()
    assert dann(discriminator, source, target, strength=1.0).item() < 0.1 < 2 * math.log(2)


# DANN


def test_dann_by_hand() -> None:
    """Logits ln 3 and 0 for sources: probabilities 3/4 and 1/2. Logit ln 3 for the target: 3/4 for the wrong domain, so 1/4."""
    value = dann(Weighted([1.0]), of([[LN3], [0.0]]), of([[LN3]]), strength=1.0)
    assert value.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2 + math.log(4))


def test_a_discriminator_that_guesses_has_the_loss_of_two_coins() -> None:
    assert dann(Weighted([0.0, 0.0, 0.0]), seen(4), seen(6, 1), strength=1.0).item() == pytest.approx(2 * math.log(2))


def test_a_certain_discriminator_has_a_finite_loss_and_slope() -> None:
    features = torch.tensor([[1e4]], requires_grad=True)
    wrong = Observation(torch.zeros(1, 2), torch.zeros(2, 0), features)
    value = dann(Weighted([1.0]), of([[-1e4]]), wrong, strength=1.0)
    value.backward()
    assert value.item() == pytest.approx(2e4) and features.grad.isfinite().all()


@pytest.mark.parametrize("weighted", [None, False, True], ids=["dann", "cdan", "cdan+e"])
def test_the_discriminator_goes_down_and_the_features_go_up(weighted: bool | None) -> None:
    """Reversed with strength 0.3, the features' slope is -0.3 times the plain one; the discriminator's is the plain one."""

    def slopes(strength: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        source, target = seen(4), seen(5, 1)
        for part in (source.features, target.features):
            part.requires_grad_()
        size = 3 if weighted is None else 6
        judge = Weighted([0.5, -1.0, 2.0, 1.5, -0.5, 1.0][:size])
        if weighted is None:
            dann(judge, source, target, strength=strength).backward()
        else:
            cdan(judge, source, target, strength=strength, entropy_weighted=weighted).backward()
        return source.features.grad, target.features.grad, judge.weights.grad

    plain, turned = slopes(-1.0), slopes(0.3)
    for one, other in zip(plain[:2], turned[:2], strict=True):
        assert one.abs().max() > 0 and torch.allclose(other, -0.3 * one)
    assert torch.allclose(plain[2], turned[2])


def test_slopes_of_dann_and_cdan() -> None:
    """Unreversed, with finite differences."""
    source, target = seen(3), seen(2, 1)
    weights = torch.tensor([0.5, -1.0, 2.0, 1.5, -0.5, 1.0], dtype=torch.float64, requires_grad=True)

    def value(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, entropy_weighted: bool | None) -> torch.Tensor:
        pair = source._replace(features=a), target._replace(features=b)
        if entropy_weighted is None:
            return dann(lambda x: x @ w[:3], *pair, strength=-1.0)
        return cdan(lambda x: x @ w, *pair, strength=-1.0, entropy_weighted=entropy_weighted)

    given_features = (source.features.requires_grad_(), target.features.requires_grad_(), weights)
    for weighted in (None, False, True):
        assert torch.autograd.gradcheck(lambda a, b, w, weighted=weighted: value(a, b, w, weighted), given_features)


# CDAN


def test_the_multilinear_map_is_the_outer_product_class_by_class() -> None:
    """Probabilities (1/4, 3/4) and features (4, 8): (1, 2) for class 0 and (3, 6) for class 1."""
    mapped = multilinear(torch.tensor([[4.0, 8.0]]), torch.tensor([[0.0, LN3]]))
    assert mapped.tolist() == [pytest.approx([1.0, 2.0, 3.0, 6.0])]


def test_certainty_lies_between_that_of_a_guess_and_two() -> None:
    """A guess among four has entropy ln 4: 1 + 1/4."""
    assert certainty(torch.tensor([[0.0] * 4, [1e4, 0.0, 0.0, 0.0]])).tolist() == pytest.approx([1.25, 2.0])


def expected_cdan(source: Observation, target: Observation, weights: np.ndarray, entropy_weighted: bool) -> float:
    """By NumPy and SciPy, image by image."""
    total = 0.0
    for part, sign in ((source, 1), (target, -1)):
        losses, shares = [], []
        for logits, features in zip(part.logits.numpy(), part.features.numpy(), strict=True):
            predicted = softmax(logits)
            losses.append(-np.log(expit(sign * np.outer(predicted, features).ravel() @ weights)))
            shares.append(1 + np.exp(-entropy(predicted)) if entropy_weighted else 1.0)
        total += np.average(losses, weights=shares)
    return float(total)


@pytest.mark.parametrize("entropy_weighted", [False, True])
def test_cdan_is_that_of_numpy(entropy_weighted: bool) -> None:
    source, target, weights = seen(4), seen(5, 1), [0.5, -1.0, 2.0, 1.5, -0.5, 1.0]
    value = cdan(Weighted(weights), source, target, strength=1.0, entropy_weighted=entropy_weighted)
    assert value.item() == pytest.approx(expected_cdan(source, target, np.array(weights), entropy_weighted))


def test_entropy_weights_change_nothing_where_all_images_are_equally_certain() -> None:
    source, target = (seen(4, seed)._replace(logits=torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)) for seed in (0, 1))
    plain, weighted = (cdan(Weighted([1.0] * 6), source, target, strength=1.0, entropy_weighted=given) for given in (False, True))
    assert plain.item() == pytest.approx(weighted.item())


@pytest.mark.parametrize("entropy_weighted", [False, True])
def test_no_gradient_flows_into_predictions(entropy_weighted: bool) -> None:
    source, target = seen(3), seen(3, 1)
    for part in (*source, *target):
        part.requires_grad_()
    cdan(Weighted([1.0] * 6), source, target, strength=1.0, entropy_weighted=entropy_weighted).backward()
    assert source.logits.grad is None and target.logits.grad is None
    assert source.features.grad.abs().max() > 0


# Bad input


def test_unlike_domains_are_refused() -> None:
    judge = Weighted([1.0] * 6)
    with pytest.raises(FedimprError, match=r"DANN: target features must be \(N, 3\) with N >= 1 \(value \(4, 2\)\)"):
        dann(judge, seen(4), seen(4, features=2), strength=1.0)
    with pytest.raises(FedimprError, match=r"CDAN: target features must be"):
        cdan(judge, seen(4), seen(4, features=2), strength=1.0, entropy_weighted=False)
    with pytest.raises(FedimprError, match=r"CDAN: target logits must be \(N, 2\) with N >= 1 \(value \(4, 5\)\)"):
        cdan(judge, seen(4), seen(4, classes=5), strength=1.0, entropy_weighted=False)
    with pytest.raises(FedimprError, match=r"of the same images \(value \(4, 3\)\)"):
        cdan(judge, seen(4)._replace(logits=torch.zeros(3, 2)), seen(4), strength=1.0, entropy_weighted=False)


def test_a_discriminator_of_another_size_is_refused() -> None:
    with pytest.raises(FedimprError, match=r"must be \(N, 7\) with N >= 1 \(value \(8, 3\)\)"):
        dann(Discriminator(7, (5,), generator()), seen(4), seen(4, 1), strength=1.0)
    with pytest.raises(ConfigError, match="hidden"):
        Discriminator(3, (5, 0), generator())


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_a_progress_out_of_range_is_refused(progress: float) -> None:
    with pytest.raises(FedimprError, match=r"gradient reversal: the progress of a training is a number in \[0, 1\]"):
        reversal_strength(progress, 10.0)


def test_a_strength_that_never_grows_is_refused() -> None:
    with pytest.raises(ConfigError, match="gamma"):
        reversal_strength(0.5, 0.0)
