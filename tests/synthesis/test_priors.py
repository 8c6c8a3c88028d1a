"""The terms of inversion losses, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fedimpr.synthesis.priors import decision_adversarial, instance_contrast


def test_the_student_is_pushed_away_only_where_it_agrees() -> None:
    """Row 0 agrees: KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) + 1/4 ln(1/2), the student's tie going to class 0. Row 1 disagrees:
    nothing.
    """
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 1.0]])
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = decision_adversarial(teacher, student)
    assert loss.item() == pytest.approx(-(0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    loss.backward()
    assert student.grad[1].tolist() == [0.0, 0.0]


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
