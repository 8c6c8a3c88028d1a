"""The terms of inversion losses: values by hand, gradients against finite differences."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError
from fedimpr.observation import Observation
from fedimpr.synthesis.priors import (
    RunningStatistics,
    cross_entropy,
    disagreement,
    entropy,
    imbalance,
    instance_contrast,
    total_variation,
)
from tests.makers import Linear, priors, small_model

LN2, LN3 = math.log(2), math.log(3)
FORMS = ("kl", "masked_kl", "l1", "js")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalising(*statistics: tuple[list[float], list[float]]) -> nn.Module:
    """A module whose batch-norm layers remember these means and variances."""
    layers = [nn.BatchNorm1d(len(mean)) for mean, _ in statistics]
    for layer, (mean, variance) in zip(layers, statistics, strict=True):
        layer.running_mean, layer.running_var = torch.tensor(mean), torch.tensor(variance)
    return nn.Sequential(*layers).eval()


# What the teacher shows


def test_cross_entropy_to_classes_and_to_distributions_divides_by_the_temperature() -> None:
    """Logits (0, ln 3) are probabilities 1/4 and 3/4; at temperature 2 logits (0, 2 ln 3) are the same."""
    logits = torch.tensor([[0.0, LN3]])
    assert cross_entropy(logits, torch.tensor([1]), 1.0).item() == pytest.approx(math.log(4 / 3))
    assert cross_entropy(2 * logits, torch.tensor([0]), 2.0).item() == pytest.approx(math.log(4))
    halves = torch.tensor([[0.5, 0.5]])
    assert cross_entropy(logits, halves, 1.0).item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    both = torch.cat([logits, -logits])  # a mean over the batch: ln(4 / 3) and ln 4
    assert cross_entropy(both, torch.tensor([1, 1]), 1.0).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_entropy_is_the_mean_over_images() -> None:
    """Of (1/4, 3/4): ln 4 / 4 + 3/4 ln(4/3) = 2 ln 2 - 3/4 ln 3. Of (1/2, 1/2): ln 2."""
    logits = torch.tensor([[0.0, LN3], [5.0, 5.0]])
    assert entropy(logits).item() == pytest.approx((2 * LN2 - 0.75 * LN3 + LN2) / 2)


def test_imbalance_is_least_where_all_classes_are_answered_equally_often() -> None:
    """Four images, each certainly of another class, and four images that could be anything: both -ln 4. One class only: 0."""
    for logits in (100 * torch.eye(4), torch.zeros(4, 4)):
        assert imbalance(logits).item() == pytest.approx(-math.log(4))
    assert imbalance(torch.tensor([[100.0, 0.0]]).repeat(4, 1)).item() == pytest.approx(0)
    # Mean answer ((1/4 + 1/2) / 2, (3/4 + 1/2) / 2) = (3/8, 5/8).
    expected = 3 / 8 * math.log(3 / 8) + 5 / 8 * math.log(5 / 8)
    assert imbalance(torch.tensor([[0.0, LN3], [0.0, 0.0]])).item() == pytest.approx(expected)


@given(st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=6))
def test_imbalance_lies_between_minus_ln_k_and_zero(rows: list[list[float]]) -> None:
    assert -math.log(3) - 1e-5 <= imbalance(torch.tensor(rows)).item() <= 1e-5


# The images


def test_total_variation_adds_the_norms_of_four_directions() -> None:
    """In ((0, 1), (3, 7)) neighbours differ by 1 and 4 to the right, 3 and 6 downwards, 7 and 2 along the diagonals."""
    image = torch.tensor([[[[0.0, 1.0], [3.0, 7.0]]]])
    assert total_variation(image).item() == pytest.approx(math.sqrt(17) + math.sqrt(45) + 7 + 2)
    # One norm over the whole batch: twice the image is sqrt 2 times as rough, not twice.
    assert total_variation(image.repeat(2, 1, 1, 1)).item() == pytest.approx(math.sqrt(2) * (math.sqrt(17) + math.sqrt(45) + 9))


def test_total_variation_of_even_images_is_nothing() -> None:
    assert total_variation(torch.full((2, 3, 4, 5), 0.7)).item() == pytest.approx(0, abs=1e-5)


# Batch-norm statistics


def test_distance_adds_the_norms_of_mean_and_variance_layer_by_layer() -> None:
    """One layer: means are (3, 4) apart, variances (5, 12): 5 + 13. A second layer adds 1 + 2; its channels join no norm of the first."""
    one = ([1.0, 2.0], [4.0, 1.0])
    seen = torch.tensor([[4.0, 6.0], [9.0, 13.0]])
    assert RunningStatistics(normalising(one)).distance(seen).item() == pytest.approx(18, rel=1e-5)
    more = torch.cat([seen, torch.tensor([[1.0], [3.0]])], 1)
    assert RunningStatistics(normalising(one, ([0.0], [1.0]))).distance(more).item() == pytest.approx(21, rel=1e-5)


def test_divergence_adds_the_divergences_of_the_channels() -> None:
    """KL(N(1, 4) || N(0, 1)) = (4 + 1 - 1 - ln 4) / 2 and KL(N(0, 1) || N(0, 4)) = (1/4 - 1 + ln 4) / 2."""
    teacher = normalising(([0.0], [1.0]), ([0.0], [4.0]))
    seen = torch.tensor([[1.0, 0.0], [4.0, 1.0]])
    expected = (4 - math.log(4)) / 2 + (0.25 - 1 + math.log(4)) / 2
    assert RunningStatistics(teacher).divergence(seen).item() == pytest.approx(expected)


def test_distances_to_an_ensemble_are_means_over_its_members() -> None:
    """Members remember (0; 1) and (3; 1). Means of 4 are 4 and 1 away and variances 2 and 2: (4 + 2 + 1 + 2) / 2."""
    ensemble = Ensemble([normalising(([0.0], [1.0])), normalising(([3.0], [1.0]))])
    seen = torch.tensor([[4.0, 4.0], [3.0, 3.0]])
    assert RunningStatistics(ensemble).distance(seen).item() == pytest.approx(4.5, rel=1e-5)
    # KL(N(m, 3) || N(m0, 1)) = (3 + (m - m0)^2 - 1 - ln 3) / 2, with squares 16 and 1.
    expected = ((2 + 16 - LN3) / 2 + (2 + 1 - LN3) / 2) / 2
    assert RunningStatistics(ensemble).divergence(seen).item() == pytest.approx(expected)


@pytest.mark.parametrize("gap", ["distance", "divergence"])
def test_statistics_that_are_met_exactly_cost_nothing_and_have_a_finite_slope(gap: str) -> None:
    kept = RunningStatistics(normalising(([0.5, -1.0], [2.0, 1.0]), ([3.0], [0.25])))
    seen = kept.values.clone().requires_grad_()
    value = getattr(kept, gap)(seen)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5) and seen.grad.abs().max().item() < 1e-5


@pytest.mark.parametrize("gap", ["distance", "divergence"])
def test_channels_that_never_varied_give_finite_values(gap: str) -> None:
    kept = RunningStatistics(normalising(([0.0, 0.0], [0.0, 0.0])))
    for seen in (torch.zeros(2, 2), torch.tensor([[0.3, -0.3], [0.0, 1.0]])):
        value = getattr(kept, gap)(seen.requires_grad_())
        value.backward()
        assert value.isfinite() and seen.grad.isfinite().all()


# The student


def test_disagreement_by_hand() -> None:
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) + 1/4 ln(1/2), and the logits are (ln 3, 0) apart on average by ln 3 / 2."""
    teacher, student = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert disagreement(teacher, student, "kl").item() == pytest.approx(expected)
    assert disagreement(teacher, student, "masked_kl").item() == pytest.approx(expected)  # the student's tie goes to class 0
    assert disagreement(teacher, student, "l1").item() == pytest.approx(LN3 / 2)


def test_jensen_shannon_divergence_has_temperature_three() -> None:
    """Logits (3 ln 3, 0) and (0, 3 ln 3) are (3/4, 1/4) and (1/4, 3/4), both as far from their middle (1/2, 1/2)."""
    teacher, student = torch.tensor([[3 * LN3, 0.0]]), torch.tensor([[0.0, 3 * LN3]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert disagreement(teacher, student, "js").item() == pytest.approx(expected)
    assert disagreement(1000 * teacher, 1000 * student, "js").item() == pytest.approx(LN2)  # at most


def test_the_student_is_pushed_away_only_where_it_agrees() -> None:
    """Row 0 agrees: 3/4 ln(3/2) + 1/4 ln(1/2). Row 1 disagrees: nothing, neither value nor slope."""
    teacher = torch.tensor([[LN3, 0.0], [0.0, 1.0]])
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = disagreement(teacher, student, "masked_kl")
    assert value.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    value.backward()
    assert student.grad[1].tolist() == [0.0, 0.0] and student.grad[0].abs().min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_student_that_answers_as_its_teacher_does_not_disagree(form: str) -> None:
    logits = torch.randn(5, 3, generator=generator())
    assert disagreement(logits, logits.clone(), form).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_class_that_is_out_of_the_question_has_a_finite_slope(form: str) -> None:
    """Its probability is zero in floating point."""
    teacher, student = torch.tensor([[1.0, 0.5, -1e4]]).requires_grad_(), torch.tensor([[0.2, 0.0, -2e4]]).requires_grad_()
    disagreement(teacher, student, form).backward()
    assert teacher.grad.isfinite().all() and student.grad.isfinite().all()


# Slopes


def double(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_slopes_of_cross_entropy_entropy_and_balance(temperature: float) -> None:
    logits, classes, mixed = double(4, 3), torch.tensor([0, 2, 1, 1]), double(4, 3, seed=1).detach().softmax(1)
    for wanted in (classes, mixed):
        assert torch.autograd.gradcheck(lambda z, wanted=wanted: cross_entropy(z, wanted, temperature), logits)
    assert torch.autograd.gradcheck(entropy, logits) and torch.autograd.gradcheck(imbalance, logits)


def test_slopes_of_the_roughness_and_of_batch_norm_statistics() -> None:
    assert torch.autograd.gradcheck(total_variation, double(2, 1, 3, 4))
    kept = RunningStatistics(normalising(([0.5, -1.0], [2.0, 1.0]), ([3.0], [0.25])))
    seen = torch.stack([double(3).detach(), double(3, seed=1).detach().exp()]).requires_grad_()  # variances are positive
    assert torch.autograd.gradcheck(kept.distance, seen) and torch.autograd.gradcheck(kept.divergence, seen)


@pytest.mark.parametrize("form", FORMS)
def test_slopes_of_disagreement_reach_teacher_and_student(form: str) -> None:
    assert torch.autograd.gradcheck(lambda t, s: disagreement(t, s, form), (double(6, 3), double(6, 3, seed=1)))


TERMS = ("target", "confidence", "entropy", "balance", "activation", "batch_norm", "total_variation", "norm", "adversarial")


def smooth(seed: int) -> nn.Module:
    """Nine pixels, five units, batch norm, three classes, and no kink anywhere."""
    layers = [nn.Flatten(), nn.Linear(9, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)]
    for layer in (layers[1], layers[4]):
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator(seed))
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("term", TERMS)
def test_slopes_of_every_term_down_to_the_pixels(term: str) -> None:
    """Central differences over 0.01 either way, in float32 as the loss is: the error is of the order of 0.01^2 and of 1e-7 / 0.01."""
    loss = priors(**{term: 1.0}).bound(smooth(0), smooth(1))
    images, wanted = torch.rand(4, 1, 3, 3, generator=generator()), torch.tensor([0, 1, 2, 0])
    direction = F.normalize(torch.randn(images.shape, generator=generator(2)).flatten(), dim=0).view_as(images)

    def value(x: torch.Tensor) -> torch.Tensor:
        return loss(x, wanted)[term]

    (slope,) = torch.autograd.grad(value(images.requires_grad_()), images)
    with torch.no_grad():
        difference = (value(images + 0.01 * direction) - value(images - 0.01 * direction)) / 0.02
    assert slope.abs().max() > 1e-3
    assert (slope * direction).sum().item() == pytest.approx(difference.item(), abs=1e-3, rel=1e-2)


@pytest.mark.parametrize("term", ["total_variation", "norm"])
def test_black_images_have_a_finite_slope(term: str) -> None:
    images = torch.zeros(2, 1, 3, 3).requires_grad_()
    priors(**{term: 1.0}).bound(smooth(0), None)(images, None)[term].backward()
    assert images.grad.abs().max().item() == 0


# Their weighted sum


def test_terms_are_weighted_and_those_without_weight_are_not_computed() -> None:
    """Confidence of (3/4, 1/4) and of (1/8, 7/8) is (ln(4/3) + ln(8/7)) / 2; features 1, -2, 3, 0 have a mean magnitude of 3/2; the
    norm of pixels 3 and 4 is 5.
    """
    logits, features = torch.tensor([[LN3, 0.0], [0.0, math.log(7)]]), torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    images = torch.tensor([3.0, 4.0]).view(2, 1, 1, 1)
    loss = priors(confidence=2.0, activation=0.1, norm=3.0).bound(Linear([[0.0], [0.0]]), None)
    found = loss.of(images, Observation(logits, torch.zeros(2, 0), features), None)
    assert set(found) == loss.terms == {"confidence", "activation", "norm"}
    assert found["confidence"].item() == pytest.approx(math.log(4 / 3) + math.log(8 / 7))
    assert found["activation"].item() == pytest.approx(-0.15)
    assert found["norm"].item() == pytest.approx(15)


def test_target_and_student_are_judged_on_the_images_alone() -> None:
    """The teacher saw one image more, as with CMI's local views; the student agrees in logits, so nothing is left but the target."""
    teacher, images = Linear([[LN3], [0.0]]), torch.ones(1, 1, 1, 1)
    loss = priors(target=1.0, adversarial=1.0).bound(teacher, teacher, temperature=2.0)
    seen = Observation(torch.tensor([[LN3, 0.0], [9.0, 9.0]]), torch.zeros(2, 0), torch.zeros(2, 0))
    found = loss.of(images, seen, torch.tensor([1]))
    root = math.sqrt(3)  # at temperature 2 the odds 3 : 1 are sqrt 3 : 1
    assert found["target"].item() == pytest.approx(math.log(1 + root)) and found["adversarial"].item() == pytest.approx(0)


def test_the_student_is_looked_for_where_it_differs() -> None:
    """The term is minus the disagreement: logits ln 3 and 0 apart by l1."""
    loss = priors(adversarial=2.0, adversarial_form="l1").bound(Linear([[LN3], [0.0]]), Linear([[0.0], [0.0]]))
    assert loss(torch.ones(1, 1, 1, 1), None)["adversarial"].item() == pytest.approx(-LN3)


def test_the_form_of_the_batch_norm_term() -> None:
    """One pixel of 1 and one of 3 have mean 2 and variance 1; against (0; 4): distance 2 + 3, divergence (1/4 + 1 - 1 + ln 4) / 2."""
    teacher = nn.Sequential(nn.Flatten(), normalising(([0.0], [4.0])))
    images = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    for form, expected in (("distance", 5.0), ("divergence", (0.25 + math.log(4)) / 2)):
        found = priors(batch_norm=1.0, batch_norm_form=form).bound(teacher, None)(images, None)
        assert found["batch_norm"].item() == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_computed_is_dropped_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    one = priors(target=1.0, batch_norm=2.0, adversarial=0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert one.bound(small_model(batch_norm=False), None).terms == {"target"}
    assert [record.getMessage() for record in caplog.records] == [
        "the batch_norm term (weight 2) is dropped: the teacher has no batch norm",
        "the adversarial term (weight 0.5) is dropped: there is no student",
    ]
    assert one.bound(small_model(), small_model()).terms == {"target", "batch_norm", "adversarial"}


@pytest.mark.parametrize("change", [*({term: -0.1} for term in TERMS), {"batch_norm_form": "x"}, {"adversarial_form": "x"}])
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        priors(**change)


# Instance contrast


def test_contrast_without_a_bank_is_the_cross_entropy_of_own_against_others() -> None:
    """Two orthogonal instances whose views agree: cosines 1 and 0, so each loses -ln(e^(1/t) / (e^(1/t) + 1))."""
    units = torch.eye(2)
    t = 0.5
    expected = math.log(1 + math.exp(-1 / t))
    assert instance_contrast(units, units, 2, t).item() == pytest.approx(expected)


def test_current_and_banked_means_are_added_so_that_the_bank_does_not_dilute() -> None:
    g = torch.Generator().manual_seed(0)
    local, keys = (F.normalize(torch.randn(6, 4, generator=g), dim=1) for _ in range(2))
    per_row = [-(local[i] @ keys.T / 0.1).log_softmax(0)[i].item() for i in range(6)]
    expected = sum(per_row[:2]) / 2 + sum(per_row[2:]) / 4
    assert instance_contrast(local, keys, 2, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_through_the_keys() -> None:
    local, keys = (torch.eye(3).requires_grad_() for _ in range(2))
    instance_contrast(local, keys, 3, 0.1).backward()
    assert local.grad is not None and keys.grad is None


def test_slopes_of_the_contrast_reach_the_local_views() -> None:
    keys = double(5, 3, seed=1).detach()
    assert torch.autograd.gradcheck(lambda local: instance_contrast(local, keys, 2, 0.5), double(5, 3))
