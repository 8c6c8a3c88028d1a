"""What one client sends, and the average of what several sent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedimpr.errors import UpdateError

BLOCK = 131_072  # elements that are looked at or summed at a time
TOGETHER, HELD = 8, 64 << 20  # updates that are summed in one go, and the bytes from which on fewer are


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


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict as it travels: copies on the CPU, contiguous, however the model's tensors lie in memory."""
    plain = torch.contiguous_format
    return {name: tensor.detach().to("cpu", copy=True, memory_format=plain) for name, tensor in model.state_dict().items()}


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
    if not all(map(math.isfinite, (block.sum().item() for block in _blocks(list(weights.values()))))):
        for name in reference:
            if not bool((finite := weights[name].isfinite()).all()):
                bad = weights[name][~finite][0].item()
                return f"tensor '{name}' is not finite", bad, "Lower training.lr or look at that client's images."
    return None


def _blocks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements in a row, in blocks of one type that a core's cache holds: large tensors in parts, small ones together.

    What is done to a model block by block costs neither a call for each of its tensors nor the way to memory for each step.
    """
    small, held = list[Tensor](), 0
    for tensor in tensors:
        if small and (held + tensor.numel() > BLOCK or tensor.dtype != small[0].dtype):
            yield torch.cat(small)
            small, held = [], 0
        if tensor.numel() > BLOCK:
            yield from tensor.reshape(-1).split(BLOCK)
        else:
            small.append(tensor.reshape(-1))
            held += tensor.numel()
    if small:
        yield torch.cat(small)


class Average:
    """The weights of updates of one architecture, averaged by number of examples (FedAvg; McMahan et al., AISTATS 2017, algorithm 1).

    It holds one sum, in float64, however many updates are added, and the last few updates, which must not be changed in place: the sum is
    written anew for several of them at a time, since for large models the way to memory is most of what that takes. It depends on their
    order in its last bits: add them in the order of partitions.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._shapes: dict[str, torch.Size] = {}  # in the order of the sums: those of one type side by side
        self._sums = torch.empty(0, dtype=torch.float64)
        self._waiting: list[tuple[list[Tensor], int]] = []  # to be summed: tensors in that order, and how many times

    @property
    def sums(self) -> dict[str, Tensor]:
        """The weighted sums, in float64."""
        self._sum_up()
        parts = self._sums.split([shape.numel() for shape in self._shapes.values()]) if self._shapes else ()
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def add(self, update: Update) -> None:
        """Take in one more."""
        self.add_sums(update.weights, update.examples, times=update.examples)

    def add_sums(self, sums: Mapping[str, Tensor], examples: int, *, times: int = 1) -> None:
        """Take in what another average has summed up, ``times`` over."""
        if not self._shapes:
            self._shapes = {name: tensor.shape for name, tensor in sorted(sums.items(), key=lambda item: str(item[1].dtype))}
            self._sums = torch.zeros(sum(tensor.numel() for tensor in sums.values()), dtype=torch.float64)
        tensors = [sums[name].cpu() for name in self._shapes]
        if self._waiting and any(one.dtype != two.dtype for one, two in zip(tensors, self._waiting[0][0], strict=True)):
            self._sum_up()  # other types lie in other blocks
        self._waiting.append((tensors, times))
        self.examples += examples
        if len(self._waiting) == TOGETHER or len(self._waiting) * sum(tensor.nbytes for tensor in tensors) >= HELD:
            self._sum_up()

    def _sum_up(self) -> None:
        """Add what waits: block by block, and in each one after another."""
        at, widened = 0, torch.empty(BLOCK, dtype=torch.float64)  # a sum of two types would make room for this anew each time
        for blocks in zip(*(_blocks(tensors) for tensors, _ in self._waiting), strict=True):
            size = len(blocks[0])
            into, wide = self._sums[at : at + size], widened[:size]
            for block, (_, times) in zip(blocks, self._waiting, strict=True):
                into.add_(block if block.dtype == into.dtype else wide.copy_(block), alpha=times)
            at += size
        self._waiting.clear()

    def weights(self, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average of what was added, one update or more, in the types of ``reference``; integer buffers are rounded."""
        totals, means = self.sums, {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in reference.items()}
        for name, total in totals.items():
            for into, sums in zip(means[name].view(-1).split(BLOCK), total.view(-1).split(BLOCK), strict=True):
                mean = sums / self.examples
                into.copy_(mean if into.is_floating_point() else mean.round())
        return means


def average(updates: Iterable[Update]) -> dict[str, Tensor]:
    """The :class:`Average` of M >= 1 updates, in whatever order they come."""
    mean, ordered = Average(), sorted(updates, key=lambda update: update.partition)
    for update in ordered:
        mean.add(update)
    return mean.weights(ordered[0].weights)
