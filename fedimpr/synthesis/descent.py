"""The inner loop of every method: what images are drawn from moves down a loss, on the device, without the host looking.

The host learns once a batch whether all went well, not once a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fedimpr.errors import FedimprError
from fedimpr.synthesis.base import Progress

log = logging.getLogger(__name__)

Told = Callable[[int, Tensor], None]


class Steps(Protocol):
    """What takes a step once gradients are there: an optimiser, or what gathers gradients for one."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Use the gradients."""


class Diverged(FedimprError):
    """A term of the loss was not finite in some step of a batch."""

    def __init__(self, term: str, step: int) -> None:
        super().__init__(f"the {term} term was not finite in step {step}", stage="synthesis", remedy="Lower the learning rate.")
        self.term, self.step = term, step


def descend(
    draw: Callable[[], Tensor],
    terms: Callable[[Tensor], dict[str, Tensor]],
    optimisers: Sequence[Steps],
    *,
    steps: int,
    told: Told,
    keep: Literal["best", "last"],
    project: Callable[[], None] = lambda: None,
) -> Tensor:
    """Take ``steps`` steps down the sum of ``terms(draw())``; return images (N, C, H, W) without a gradient.

    Args:
        draw: draws the batch from what is optimised.
        terms: the weighted terms of the loss of a batch, by name; the same names in every step.
        optimisers: of what ``draw`` draws from, and of what ``terms`` learns on the way.
        steps: >= 1.
        told: told the number of steps taken and the loss, after each.
        keep: ``"best"``, the images of the step with the least loss, or ``"last"``, those after the last step.
        project: called after every step to bring back what left its range.

    Raises:
        Diverged: a term was not finite; named with its first step, counted from 1.
        FedimprError: the loss has no term.
    """
    best, least, broken, names = None, None, None, ["loss"]
    for step in range(1, steps + 1):
        images = draw()
        found = terms(images)
        if not found:
            remedy = "Give a weight to a term that teacher and student can support."
            raise FedimprError("no term is left of the inversion loss", stage="synthesis", remedy=remedy)
        values = torch.stack(list(found.values()))
        loss = values.sum()
        with torch.no_grad():
            names = list(found)
            now = torch.where(values.isfinite(), steps + 1, step)  # (terms,): the first step in which each term broke
            broken = now if broken is None else torch.minimum(broken, now)
            if keep == "best":
                if best is None or least is None:
                    best, least = images.detach().clone(), loss.detach().clone()
                else:
                    better = loss < least
                    best, least = torch.where(better, images, best), torch.where(better, loss, least)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            project()
        told(step, loss.detach())
    assert broken is not None
    first = broken.tolist()
    if min(first) <= steps:
        raise Diverged(names[first.index(min(first))], min(first))
    if best is not None:
        return best
    with torch.no_grad():
        return draw().detach().clone()


class Mined(NamedTuple):
    """Finished images of a batch, (N, C, H, W), and the classes (N,) that they were asked to show."""

    images: Tensor
    labels: Tensor


def mine_batches(count: int, steps: int, progress: Progress, mine: Callable[[int, Told], Mined]) -> Mined:
    """Mine ``count`` batches of ``steps`` steps each, one after another.

    A batch that diverges is left out, with a warning that says where, and all finished images are kept.

    Args:
        count: of batches.
        steps: of a batch.
        progress: told after every step.
        mine: mines one batch, given its place and whom to tell.

    Raises:
        Diverged: every batch diverged.
    """
    done: list[Mined] = []
    failure: Diverged | None = None
    for batch in range(count):

        def told(step: int, loss: Tensor, before: int = batch * steps) -> None:
            progress("mining", before + step, count * steps, loss=loss)

        try:
            done.append(mine(batch, told))
        except Diverged as error:
            failure = error
            log.warning("batch %d of %d is left out: %s", batch + 1, count, error)
    if not done:
        assert failure is not None
        raise failure
    return Mined(*(torch.cat(parts) for parts in zip(*done, strict=True)))
