"""What one client sends, and the average of what several sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def average(updates: Sequence[Update]) -> dict[str, Tensor]:
    """The weights of all updates, averaged by number of examples (FedAvg; McMahan et al., AISTATS 2017, algorithm 1).

    Sums run in float64 and in the order of partitions, whatever the order of ``updates``; integer buffers are rounded. One update's
    tensor is read at a time.

    Args:
        updates: M >= 1 updates of one architecture.
    """
    ordered = sorted(updates, key=lambda update: update.partition)
    total = sum(update.examples for update in ordered)
    mean: dict[str, Tensor] = {}
    for name, first in ordered[0].weights.items():
        sum_ = torch.zeros(first.shape, dtype=torch.float64)
        for update in ordered:
            sum_ += update.weights[name].double().cpu() * (update.examples / total)
        mean[name] = (sum_ if first.is_floating_point() else sum_.round()).to(first.dtype)
    return mean
