"""What one client sends, and the average of what several sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedimpr.errors import UpdateError

BLOCK = 65_536  # elements that are summed at a time


@dataclass(frozen=True)
class Update:
    """One client's answer to one round.

    Attributes:
        partition: the client, by its partition.
        round: the federated round, counted from 1.
        weights: the state dict of the trained model.
        examples: number of images it was trained on, >= 1.
        metrics: scalars of the local training.
        label_counts: (K,) images per class; only where the configuration lets clients send it.
    """

    partition: int
    round: int
    weights: dict[str, Tensor]
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    label_counts: Tensor | None = None

    def check(self, reference: Mapping[str, Tensor]) -> None:
        """Compare with the state dict of the architecture the client was asked to train.

        Raises:
            UpdateError: a tensor is missing, unknown, of another shape or type, or not finite; or the number of examples is not positive.
        """
        if self.examples < 1:
            remedy = "A client without images must not answer."
            raise self._wrong("the number of examples must be >= 1", self.examples, remedy)
        if found := difference(self.weights, reference):
            raise self._wrong(*found)

    def _wrong(self, problem: str, value: object, remedy: str) -> UpdateError:
        return UpdateError(problem, client=self.partition, round=self.round, stage="checking the update", value=value, remedy=remedy)


def difference(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[str, object, str] | None:
    """What is wrong with weights that have to be finite and of a reference's names, shapes and types: problem, value, remedy."""
    same_model = "Client and server must build the same architecture: compare their config."
    if missing := sorted(reference.keys() - weights.keys()):
        return "a tensor is missing", missing[0], same_model
    if unknown := sorted(weights.keys() - reference.keys()):
        return "a tensor is unknown", unknown[0], same_model
    for name, wanted in reference.items():
        got = weights[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"tensor '{name}' must be {tuple(wanted.shape)} {wanted.dtype}", (tuple(got.shape), str(got.dtype)), same_model
        # A sum is finite only where all its terms are, and takes a twentieth of the time of looking at each; it may overflow, though.
        if not bool(got.sum().isfinite()) and not bool(got.isfinite().all()):
            bad = got[~got.isfinite()][0].item()
            return f"tensor '{name}' is not finite", bad, "Lower training.lr or look at that client's images."
    return None


class Average:
    """The weights of updates of one architecture, averaged by number of examples (FedAvg; McMahan et al., AISTATS 2017, algorithm 1).

    It holds one sum, in float64, however many updates are added. The sum depends on their order in its last bits: add them in the order
    of partitions.
    """

    def __init__(self) -> None:
        self.examples = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, update: Update) -> None:
        """Take in one more."""
        self.add_sums(update.weights, update.examples, times=update.examples)

    def add_sums(self, sums: Mapping[str, Tensor], examples: int, *, times: int = 1) -> None:
        """Take in what another average has summed up, ``times`` over."""
        if not self.sums:
            self.sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in sums.items()}
        for name, sum_ in self.sums.items():
            _accumulate(sum_, sums[name].cpu(), times)
        self.examples += examples

    def weights(self, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average of what was added, one update or more, in the types of ``reference``; integer buffers are rounded."""
        means = {name: sum_ / self.examples for name, sum_ in self.sums.items()}
        return {
            name: (mean if reference[name].is_floating_point() else mean.round()).to(reference[name].dtype) for name, mean in means.items()
        }


def _accumulate(sum_: Tensor, term: Tensor, times: int) -> None:
    """``sum_ += times * term``, in blocks that stay in a core's cache while they become float64: twice as fast as in one go."""
    doubles = torch.empty(min(BLOCK, term.numel()), dtype=torch.float64)
    for into, block in zip(sum_.view(-1).split(BLOCK), term.reshape(-1).split(BLOCK), strict=True):
        into.add_(doubles[: len(block)].copy_(block), alpha=times)


def average(updates: Iterable[Update]) -> dict[str, Tensor]:
    """The :class:`Average` of M >= 1 updates, in whatever order they come."""
    mean, ordered = Average(), sorted(updates, key=lambda update: update.partition)
    for update in ordered:
        mean.add(update)
    return mean.weights(ordered[0].weights)
