"""Measures of continual learning, against a matrix that is worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedimpr.continual.measures import (
    average_incremental_accuracy,
    backward_transfer,
    describe,
    forgetting,
    forward_transfer,
    last_accuracy,
    seen_accuracies,
)
from fedimpr.errors import FedimprError

NAN = float("nan")
# Task 0 gets better in step 1 before it falls, so that its best is not where it was learnt.
BY_HAND = torch.tensor([[0.8, 0.1, 0.0], [0.9, 0.7, 0.3], [0.5, 0.6, 1.0]], dtype=torch.float64)
BELOW = BY_HAND.where(torch.ones(3, 3).tril() > 0, NAN)
TEST_IMAGES = torch.tensor([100, 300, 600])
INITIAL = torch.tensor([0.2, 0.4, 0.1])


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def matrices(draw: st.DrawFn, least: int = 2) -> Tensor:
    """Accuracy matrices; all, some or none of the entries above the diagonal are missing."""
    size = draw(st.integers(least, 4))
    entry = st.floats(0, 1)
    above = draw(st.sampled_from([entry, st.just(NAN), entry | st.just(NAN)]))
    return rows(*[[draw(entry if j <= t else above) for j in range(size)] for t in range(size)])


# --- By hand ---


@pytest.mark.parametrize("matrix", [BY_HAND, BELOW, BY_HAND.float()], ids=["full", "below the diagonal", "float32"])
def test_accuracy_over_all_tasks_so_far(matrix: Tensor) -> None:
    over_tasks = [0.8, (0.9 + 0.7) / 2, (0.5 + 0.6 + 1.0) / 3]  # 0.8, 0.8, 0.7
    assert seen_accuracies(matrix, None).tolist() == pytest.approx(over_tasks)
    assert average_incremental_accuracy(matrix, None) == pytest.approx((0.8 + 0.8 + 0.7) / 3)
    assert last_accuracy(matrix, None) == pytest.approx(0.7)
    # Images that are right: 80 of 100; 90 + 210 = 300 of 400; 50 + 180 + 600 = 830 of 1000.
    assert seen_accuracies(matrix, TEST_IMAGES).tolist() == pytest.approx([0.8, 0.75, 0.83])
    assert average_incremental_accuracy(matrix, TEST_IMAGES) == pytest.approx((0.8 + 0.75 + 0.83) / 3)
    assert last_accuracy(matrix, TEST_IMAGES) == pytest.approx(0.83)


@pytest.mark.parametrize("matrix", [BY_HAND, BELOW], ids=["full", "below the diagonal"])
def test_forgetting_is_from_the_best_over_time(matrix: Tensor) -> None:
    # Task 0: max(0.8, 0.9) - 0.5 = 0.4. Task 1: 0.7 - 0.6 = 0.1. The last task cannot be forgotten yet.
    assert forgetting(matrix) == pytest.approx((0.4 + 0.1) / 2)


def test_the_published_script_that_takes_the_best_over_tasks_gives_another_number() -> None:
    # Its maximum of each row: 0.8, 0.9, 1.0. Minus the last row: 0.3, 0.3, 0.0. The mean over all three tasks: 0.2.
    published = float((BELOW.nan_to_num(0).amax(1) - BELOW[-1]).mean())
    assert published == pytest.approx(0.2)
    assert forgetting(BELOW) == pytest.approx(0.25)
    # A task that was learnt badly and lost nothing: theirs takes the other task's accuracy for its best.
    assert forgetting(rows([0.9, NAN, NAN], [0.9, 0.4, NAN], [0.9, 0.4, 0.4])) == 0


def test_what_was_known_before_the_task_can_be_forgotten_too() -> None:
    # Task 1 stood at 0.9 after task 0 already, at 0.7 when it was learnt, and ends at 0.6.
    assert forgetting(rows([0.5, 0.9, 0.0], [0.5, 0.7, 0.0], [0.5, 0.6, 1.0])) == pytest.approx((0.0 + 0.3) / 2)
    assert forgetting(rows([0.5, NAN, NAN], [0.5, 0.7, NAN], [0.5, 0.6, 1.0])) == pytest.approx((0.0 + 0.1) / 2)


@pytest.mark.parametrize("matrix", [BY_HAND, BELOW], ids=["full", "below the diagonal"])
def test_backward_transfer_is_from_where_the_task_was_learnt(matrix: Tensor) -> None:
    assert backward_transfer(matrix) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)


def test_forward_transfer_is_from_a_model_that_has_learnt_nothing() -> None:
    # Just before they were learnt: task 1 at 0.1, task 2 at 0.3.
    assert forward_transfer(BY_HAND, INITIAL) == pytest.approx(((0.1 - 0.4) + (0.3 - 0.1)) / 2)


def test_a_description_holds_all_of_them() -> None:
    expected = {
        "average_incremental_accuracy_over_tasks": 2.3 / 3,
        "last_accuracy_over_tasks": 0.7,
        "average_incremental_accuracy_over_images": 2.38 / 3,
        "last_accuracy_over_images": 0.83,
        "forgetting": 0.25,
        "backward_transfer": -0.2,
        "forward_transfer": -0.05,
    }
    assert describe(BY_HAND, test_images=TEST_IMAGES, initial=INITIAL) == pytest.approx(expected)
    del expected["forward_transfer"]
    assert describe(BELOW, test_images=TEST_IMAGES, initial=None) == pytest.approx(expected)


def test_one_task_is_neither_forgotten_nor_transferred() -> None:
    matrix = rows([0.6])
    assert [math.isnan(value) for value in (forgetting(matrix), backward_transfer(matrix), forward_transfer(matrix, rows([0.1])[0]))] == [
        True
    ] * 3
    found = describe(matrix, test_images=torch.tensor([5]), initial=torch.tensor([0.1]))
    assert len(found) == 4 and set(found.values()) == {0.6}


# --- Properties ---


@settings(max_examples=40)
@given(matrix=matrices())
def test_forgetting_and_backward_transfer_lie_between_minus_one_and_one(matrix: Tensor) -> None:
    assert -1 <= forgetting(matrix) <= 1
    assert -1 <= backward_transfer(matrix) <= 1
    # The best is no worse than where the task was learnt.
    assert forgetting(matrix) >= -backward_transfer(matrix) - 1e-12


@settings(max_examples=40)
@given(matrix=matrices())
def test_nothing_is_forgotten_where_nothing_is_lost(matrix: Tensor) -> None:
    best = matrix.nan_to_num(0).amax(0)
    kept = matrix.clone()
    kept[-1] = best
    assert forgetting(kept) <= 0
    kept[-2, :-1] = best[:-1]  # as good a step before: nothing is gained either
    assert forgetting(kept) == 0


@settings(max_examples=40)
@given(matrix=matrices(), loss=st.floats(0, 1))
def test_what_the_last_step_loses_on_every_old_task_is_what_forgetting_grows_by(matrix: Tensor, loss: float) -> None:
    lost = matrix.clone()
    lost[-1, :-1] *= 1 - loss
    drop = float((matrix[-1, :-1] * loss).mean())
    assert forgetting(lost) == pytest.approx(forgetting(matrix) + drop)
    assert backward_transfer(lost) == pytest.approx(backward_transfer(matrix) - drop)
    assert lost[-1, -1] == matrix[-1, -1]


@settings(max_examples=40)
@given(matrix=matrices(1), counts=st.lists(st.integers(1, 10**6), min_size=4, max_size=4))
def test_accuracy_over_tasks_so_far_lies_between_their_worst_and_best(matrix: Tensor, counts: list[int]) -> None:
    for test_images in (None, torch.tensor(counts[: len(matrix)])):
        for step, accuracy in enumerate(seen_accuracies(matrix, test_images).tolist()):
            seen = matrix[step, : step + 1]
            assert float(seen.min()) - 1e-12 <= accuracy <= float(seen.max()) + 1e-12


@settings(max_examples=40)
@given(matrix=matrices(1), count=st.integers(1, 10**6))
def test_tasks_of_equal_size_weigh_the_same(matrix: Tensor, count: int) -> None:
    equal = torch.full((len(matrix),), count)
    assert seen_accuracies(matrix, equal).tolist() == pytest.approx(seen_accuracies(matrix, None).tolist())


# --- Limits ---


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 2, 2)])
def test_a_matrix_must_be_square(shape: tuple[int, ...]) -> None:
    for measure in (forgetting, backward_transfer, lambda m: last_accuracy(m, None), lambda m: forward_transfer(m, INITIAL)):
        with pytest.raises(FedimprError, match=r"an accuracy matrix is \(T, T\) with T >= 1 \(value \("):
            measure(torch.zeros(shape))


@pytest.mark.parametrize(("step", "task", "value"), [(1, 0, NAN), (2, 2, 85.0), (0, 1, -0.1), (2, 1, float("inf"))])
def test_an_accuracy_must_be_a_share(step: int, task: int, value: float) -> None:
    matrix = BY_HAND.clone()
    matrix[step, task] = value
    with pytest.raises(FedimprError, match=rf"on task {task} after task {step} is not in \[0, 1\].*Give shares, not percent"):
        forgetting(matrix)


def test_vectors_have_a_number_for_each_task() -> None:
    with pytest.raises(FedimprError, match=r"the numbers of test images must be \(3,\), one a task \(value \(2,\)\)"):
        last_accuracy(BY_HAND, torch.tensor([1, 2]))
    with pytest.raises(FedimprError, match=r"every task needs a test image or more \(value \[1.0, 0.0, 2.0\]\)"):
        last_accuracy(BY_HAND, torch.tensor([1, 0, 2]))
    with pytest.raises(FedimprError, match=r"the accuracies of the initial model must be \(3,\)"):
        forward_transfer(BY_HAND, torch.zeros(1, 3))


def test_forward_transfer_says_which_accuracy_it_lacks() -> None:
    with pytest.raises(FedimprError, match=r"of the model of the step before on task 1 \(value nan\). Evaluate it, or"):
        forward_transfer(BELOW, INITIAL)
    with pytest.raises(FedimprError, match=r"of the initial model on task 2 \(value nan\)"):
        forward_transfer(BY_HAND, torch.tensor([NAN, 0.1, NAN]))
