"""Muon, beside PyTorch's own, which takes matrices alone, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedimpr.distillation.muon import Muon, orthogonal


def moved(optimiser: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradients: list[torch.Tensor]) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_singular_values_become_alike_and_directions_stay(rows: int, columns: int, seed: int) -> None:
    """The iteration acts on singular values alone: five times ``s <- a s + b s^3 + c s^5``, from s over the norm of all."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrix), left @ values.diag() @ right, rtol=1e-6, atol=1e-6)


def test_values_of_a_well_conditioned_matrix_end_near_one() -> None:
    matrix = torch.randn(8, 75, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.65 and values.max() < 1.25


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_what_is_left_of_units_that_died_is_nothing() -> None:
    """A unit without a gradient leaves a mean that halves every 14 steps at a momentum of 0.95: denormal after some 1,700, and then slow.

    The step of all others does not change by it, down to the last bit.
    """
    alive = torch.randn(8, 75, generator=torch.Generator().manual_seed(4))
    faded, gone = alive.clone(), alive.clone()
    faded[5:], gone[5:] = 1e-39 * alive[5:], 0.0
    assert faded[5:].abs().max() > 0
    assert torch.equal(orthogonal(faded), orthogonal(gone))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_matrices_move_as_pytorchs_own_muon_moves_them(shape: tuple[int, int]) -> None:
    """It counts in bfloat16: three digits. Three steps, momentum and weight decay."""
    g = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(3)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = moved(Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.5), ours, gradients)
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    assert (mine - start).abs().max() > 0.1
    torch.testing.assert_close(mine, moved(other, theirs, gradients), rtol=0, atol=0.01)


def test_kernels_move_as_matrices_of_their_outputs() -> None:
    g = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(4, 2, 3, 3, generator=g), [torch.randn(4, 2, 3, 3, generator=g) for _ in range(2)]
    kernel = torch.nn.Parameter(start.clone())
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    moved_kernel = moved(Muon([kernel], 0.1, 0.9, 0.0), kernel, gradients)
    assert torch.equal(moved_kernel.flatten(1), moved(Muon([matrix], 0.1, 0.9, 0.0), matrix, [one.flatten(1) for one in gradients]))


def test_biases_move_as_adam_moves_them() -> None:
    g = torch.Generator().manual_seed(3)
    start, gradients = torch.randn(6, generator=g), [torch.randn(6, generator=g) for _ in range(4)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = moved(Muon([ours], 0.1, 0.9, weight_decay=0.5), ours, gradients)  # which biases do not see
    torch.testing.assert_close(mine, moved(torch.optim.Adam([theirs], 0.1, (0.9, 0.999)), theirs, gradients))


def test_a_first_step_by_hand() -> None:
    """Of a gradient with one direction, u v^T, a step of 0.2 sqrt(max(M, N)) f u v^T, where f is what five iterations make of 1."""
    f = 1.0
    for _ in range(5):
        f = 3.4445 * f - 4.7750 * f**3 + 2.0315 * f**5
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    gradient = torch.tensor([[0.0, 6.0, 8.0], [0.0, 0.0, 0.0]])  # u = (1, 0), v = (0, 0.6, 0.8), of whatever length
    after = moved(Muon([parameter], lr=0.5, momentum=0.9, weight_decay=0.0), parameter, [gradient])
    step = 0.5 * 0.2 * math.sqrt(3) * f
    torch.testing.assert_close(after, torch.tensor([[0.0, -0.6 * step, -0.8 * step], [0.0, 0.0, 0.0]]))


def test_parameters_without_a_gradient_stay() -> None:
    still = torch.nn.Parameter(torch.ones(2, 2))
    Muon([still], 0.1, 0.9, 0.5).step()
    assert torch.equal(still.detach(), torch.ones(2, 2))
