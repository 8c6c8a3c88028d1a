"""A round's updates, all of them, kept so that no client is asked twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from flwr.app import Message
from torch import Tensor

from fedimpr.errors import UpdateError
from strategies.cohort import collect
from strategies.federation import Federation
from strategies.keep import UPDATES, Received
from strategies.plan import Plan


def receive(
    federation: Federation,
    replies: Iterable[Message],
    plan: Plan,
    round: int,
    started: float,
    reference: Callable[[int], Mapping[str, Tensor]],
) -> Received:
    """The updates that were kept of this round, or else those of the replies, which are kept from now on.

    Args:
        federation: its watch is told who is left out.
        replies: in any order; none where updates are kept.
        plan: of the round.
        round: counted from 1.
        started: ``time.monotonic()`` when the round began.
        reference: a partition's expected state dict.

    Raises:
        UpdateError: too few good updates.
    """
    if federation.keep.holds(round, UPDATES):
        kept = Received.from_state_dict(federation.keep.load(round, UPDATES))
        for error in kept.excluded:
            federation.watch.excluded(error)
        return kept
    bad, sent = list[UpdateError](), dict[int, int]()

    def excluded(error: UpdateError) -> None:
        bad.append(error)
        federation.watch.excluded(error)

    # They stay for the whole round, and the memory that they came in may be the runner's: Ray's object store, say.
    good = []
    for answer in collect(replies, plan.asked, round, reference, plan.minimum, excluded, left_out=plan.left_out):
        sent |= answer.sent
        for update in answer.updates:
            good.append(replace(update, weights={name: tensor.clone() for name, tensor in update.weights.items()}))
    received = Received(good, bad, time.monotonic() - started, sent)
    federation.keep.save(round, UPDATES, received.state_dict())
    return received
