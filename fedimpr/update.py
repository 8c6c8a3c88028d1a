"""What one client sends, and the average of what several sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedimpr.errors import UpdateError


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

        def wrong(problem: str, value: object, remedy: str) -> UpdateError:
            return UpdateError(problem, client=self.partition, round=self.round, stage="checking the update", value=value, remedy=remedy)

        same_model = "Client and server must build the same architecture: compare their config."
        if self.examples < 1:
            raise wrong("the number of examples must be >= 1", self.examples, "A client without images must not answer.")
        if missing := sorted(reference.keys() - self.weights.keys()):
            raise wrong("a tensor is missing", missing[0], same_model)
        if unknown := sorted(self.weights.keys() - reference.keys()):
            raise wrong("a tensor is unknown", unknown[0], same_model)
        for name, wanted in reference.items():
            got = self.weights[name]
            if got.shape != wanted.shape or got.dtype != wanted.dtype:
                raise wrong(f"tensor '{name}' must be {tuple(wanted.shape)} {wanted.dtype}", (tuple(got.shape), str(got.dtype)), same_model)
            if not bool(got.isfinite().all()):
                bad = got[~got.isfinite()][0].item()
                raise wrong(f"tensor '{name}' is not finite", bad, "Lower training.lr or look at that client's images.")


class Average:
    """The weights of updates of one architecture, averaged by number of examples (FedAvg; McMahan et al., AISTATS 2017, algorithm 1).

    It holds one sum, in float64, however many updates are added. The sum depends on their order in its last bits: add them in the order
    of partitions.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._sums: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}

    def add(self, update: Update) -> None:
        """Take in one more."""
        if not self._sums:
            self._types = {name: tensor.dtype for name, tensor in update.weights.items()}
            self._sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in update.weights.items()}
        for name, sum_ in self._sums.items():
            sum_.add_(update.weights[name].cpu(), alpha=update.examples)
        self.examples += update.examples

    def weights(self) -> dict[str, Tensor]:
        """The average of what was added, one update or more, in the types of the first; integer buffers are rounded."""
        means = {name: sum_ / self.examples for name, sum_ in self._sums.items()}
        return {name: (mean if self._types[name].is_floating_point else mean.round()).to(self._types[name]) for name, mean in means.items()}


def average(updates: Iterable[Update]) -> dict[str, Tensor]:
    """The :class:`Average` of M >= 1 updates, in whatever order they come."""
    mean = Average()
    for update in sorted(updates, key=lambda update: update.partition):
        mean.add(update)
    return mean.weights()
