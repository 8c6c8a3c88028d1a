"""Measures of continual learning, from what a model knows of every task after every task.

An accuracy matrix is (T, T), each entry in [0, 1]. Row t is the model after it learnt task t, column j the test images of task j, both
counted from 0. Entries above the diagonal are those of tasks that are still to come; where they were not measured they are nan. Papers give
different numbers the same name, so publish the matrix as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedimpr.errors import FedimprError

STAGE = "measuring continual learning"


def describe(accuracies: Tensor, *, test_images: Tensor, initial: Tensor | None) -> dict[str, float]:
    """All measures of an accuracy matrix, by name.

    Args:
        accuracies: (T, T), the accuracy matrix.
        test_images: (T,), how many test images each task has.
        initial: (T,), the accuracy of a model that has learnt nothing on each task; ``None`` where it is not known.

    Returns:
        ``average_incremental_accuracy`` and ``last_accuracy``, each ``_over_tasks`` and ``_over_images``. With two tasks or more also
        ``forgetting`` and ``backward_transfer``, and ``forward_transfer`` where ``initial`` is given.

    Raises:
        FedimprError: a shape is wrong, or a number is missing or out of range.
    """
    matrix, found = _checked(accuracies), {}
    for name, weights in (("tasks", None), ("images", test_images)):
        found[f"average_incremental_accuracy_over_{name}"] = average_incremental_accuracy(matrix, weights)
        found[f"last_accuracy_over_{name}"] = last_accuracy(matrix, weights)
    if len(matrix) > 1:
        found |= {"forgetting": forgetting(matrix), "backward_transfer": backward_transfer(matrix)}
        if initial is not None:
            found["forward_transfer"] = forward_transfer(matrix, initial)
    return found


def seen_accuracies(accuracies: Tensor, test_images: Tensor | None) -> Tensor:
    """After each task the accuracy on all tasks so far, (T,), float64.

    Args:
        accuracies: (T, T), the accuracy matrix.
        test_images: (T,), how many test images each task has: the mean is over the images of all tasks so far, which is the accuracy over
            all classes seen so far of iCaRL (Rebuffi et al., CVPR 2017). ``None``: the mean is over the tasks, the average accuracy of
            Chaudhry et al. (ECCV 2018). The two are equal where tasks have as many test images as each other.

    Raises:
        FedimprError: as :func:`describe`.
    """
    matrix = _checked(accuracies)
    if test_images is None:
        weights = torch.ones(len(matrix), dtype=torch.float64)
    else:
        weights = _vector(test_images, len(matrix), "the numbers of test images")
        if not bool(((weights >= 1) & weights.isfinite()).all()):
            raise FedimprError("every task needs a test image or more", stage=STAGE, value=weights.tolist())
    weights = weights.expand_as(matrix).tril()
    # Where a weight is 0 the entry may be nan, and 0 times nan is nan.
    return (torch.where(weights > 0, matrix, 0) * weights).sum(1) / weights.sum(1)


def average_incremental_accuracy(accuracies: Tensor, test_images: Tensor | None) -> float:
    """The mean of :func:`seen_accuracies` over all tasks, the first one included, in [0, 1] (Rebuffi et al., CVPR 2017)."""
    return float(seen_accuracies(accuracies, test_images).mean())


def last_accuracy(accuracies: Tensor, test_images: Tensor | None) -> float:
    """The accuracy on all tasks after the last one, in [0, 1]; over tasks it is the ACC of Lopez-Paz and Ranzato (NeurIPS 2017)."""
    return float(seen_accuracies(accuracies, test_images)[-1])


def forgetting(accuracies: Tensor) -> float:
    """How far a task has fallen from its best, in [-1, 1]; 0 and below: nothing is lost (Chaudhry et al., ECCV 2018).

    For each task but the last, the maximum over all steps before the last step, minus the accuracy after it; then the mean over those
    tasks. As in their definition, an entry above the diagonal counts where there is one: what a model could do before it learnt the task
    can be lost too. Not a number where T is 1.

    A script that went with a published method takes the maximum over the tasks of a step instead, and the mean over all tasks: another
    number.

    Args:
        accuracies: (T, T), the accuracy matrix.

    Raises:
        FedimprError: as :func:`describe`.
    """
    matrix = _checked(accuracies)
    best = matrix[:-1, :-1].nan_to_num(nan=-1.0).amax(0) if len(matrix) > 1 else matrix[0, :0]
    return float((best - matrix[-1, :-1]).mean())


def backward_transfer(accuracies: Tensor) -> float:
    """What later tasks did to the earlier ones, in [-1, 1]; negative: they were forgotten (Lopez-Paz and Ranzato, NeurIPS 2017).

    The mean, over all tasks but the last, of the accuracy after the last step minus that after the task itself was learnt. Not a number
    where T is 1.

    Args:
        accuracies: (T, T), the accuracy matrix.

    Raises:
        FedimprError: as :func:`describe`.
    """
    matrix = _checked(accuracies)
    return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def forward_transfer(accuracies: Tensor, initial: Tensor) -> float:
    """What earlier tasks did for those still to come, in [-1, 1] (Lopez-Paz and Ranzato, NeurIPS 2017).

    The mean, over all tasks but the first, of the accuracy just before the task was learnt minus that of a model that has learnt nothing.
    Where classes are new in every task and a model never names one that it has not seen, it is minus the mean of ``initial`` and says
    nothing. Not a number where T is 1.

    Args:
        accuracies: (T, T), the accuracy matrix with the first diagonal above the main one.
        initial: (T,), in [0, 1]; the first one is not looked at.

    Raises:
        FedimprError: as :func:`describe`.
    """
    matrix = _checked(accuracies)
    start = _vector(initial, len(matrix), "the accuracies of the initial model")[1:]
    before = matrix.diagonal(1)
    for name, values in (("the initial model", start), ("the model of the step before", before)):
        wrong = (~((values >= 0) & (values <= 1))).nonzero().flatten()
        if len(wrong):
            task = int(wrong[0])
            problem = f"forward transfer needs the accuracy, in [0, 1], of {name} on task {task + 1}"
            raise FedimprError(problem, stage=STAGE, value=float(values[task]), remedy="Evaluate it, or leave forward transfer out.")
    return float((before - start).mean())


def _checked(accuracies: Tensor) -> Tensor:
    """The matrix in float64 on the CPU."""
    if accuracies.dim() != 2 or accuracies.shape[0] != accuracies.shape[1] or not len(accuracies):
        raise FedimprError("an accuracy matrix is (T, T) with T >= 1", stage=STAGE, value=tuple(accuracies.shape))
    matrix = accuracies.detach().to("cpu", torch.float64)
    outside = ~((matrix >= 0) & (matrix <= 1))
    wrong = (outside & (torch.ones_like(outside).tril() | ~matrix.isnan())).nonzero()
    if len(wrong):
        step, task = wrong[0].tolist()
        problem = f"the accuracy on task {task} after task {step} is not in [0, 1]"
        remedy = "Give shares, not percent, and every entry on and below the diagonal."
        raise FedimprError(problem, stage=STAGE, value=float(matrix[step, task]), remedy=remedy)
    return matrix


def _vector(values: Tensor, length: int, what: str) -> Tensor:
    if values.shape != (length,):
        raise FedimprError(f"{what} must be ({length},), one a task", stage=STAGE, value=tuple(values.shape))
    return values.detach().to("cpu", torch.float64)
