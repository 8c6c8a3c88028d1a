"""Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024), for a student of matrices, kernels and biases.

PyTorch's own takes matrices alone and counts in bfloat16, which many a CPU does in software.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # as published: singular values end between 0.7 and 1.2, and soon
SECOND_MOMENT, EPSILON = 0.999, 1e-8  # Adam's
NOTHING = 1e-20  # of a norm of 1: the mean of a unit that died fades until it is denormal, and some CPUs multiply such numbers very slowly


class Muon(torch.optim.Optimizer):
    """Steps whose singular values are all alike, for matrices and, flattened to (outputs, all else), for kernels; Adam's for the rest.

    A gradient of small matrices is mostly of one or two directions; here all of them move alike. Orthogonal steps are scaled to the size of
    Adam's, so that one learning rate serves both (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2).

    Args:
        parameters: of any shapes.
        lr: learning rate > 0, of the order of Adam's.
        momentum: in (0, 1): of the mean of gradients, with Nesterov's look ahead for matrices and kernels.
        weight_decay: of matrices and kernels, apart from the gradient: a step shrinks them by ``lr * weight_decay``.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state |= {} if parameter.ndim > 1 else {"square": torch.zeros_like(parameter), "step": torch.zeros(())}
                mean = state["mean"].lerp_(gradient, 1 - momentum)
                if parameter.ndim > 1:
                    ahead = gradient.lerp(mean, momentum).flatten(1)
                    move = 0.2 * math.sqrt(max(ahead.shape)) * orthogonal(ahead).view(parameter.shape)
                    parameter.mul_(1 - lr * group["weight_decay"])
                else:
                    state["step"] += 1
                    square = state["square"].lerp_(gradient.square(), 1 - SECOND_MOMENT)
                    first, second = (1 - beta ** state["step"].item() for beta in (momentum, SECOND_MOMENT))
                    move = mean / first / ((square / second).sqrt() + EPSILON)
                parameter.sub_(move, alpha=lr)


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the nearest matrix (M, N) with orthonormal rows or columns, whichever are fewer: the same directions, singular values near 1.

    By the iteration ``X <- a X + b (X X^T) X + c (X X^T)^2 X`` from a norm of 1; a matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    near = matrix.T if tall else matrix
    near = F.hardshrink(near / near.norm().clamp(min=1e-30), NOTHING)
    for _ in range(ITERATIONS):
        gram = near @ near.T
        near = torch.addmm(near, torch.addmm(gram, gram, gram, beta=b, alpha=c), near, beta=a)
    return near.T.contiguous() if tall else near
