"""A round's updates, all of them, kept so that no client is asked twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

from flwr.app import Message
from torch import Tensor

from fedimpr.errors import UpdateError
from fedimpr.states import size_of
from strategies.cohort import collect
from strategies.federation import Federation
from strategies.keep import UPDATES, Received, answered, put_away, taken_out
from strategies.plan import Plan


def receive(
    federation: Federation,
    replies: Iterable[Message],
    plan: Plan,
    round: int,
    started: float,
    reference: Callable[[int], Mapping[str, Tensor]],
    *,
    in_memory_mb: float,
) -> Received:
    """The updates that were kept of this round, or else those of the replies, which are kept from now on.

    Args:
        federation: its watch is told who is left out.
        replies: in any order; none where updates are kept.
        plan: of the round.
        round: counted from 1.
        started: ``time.monotonic()`` when the round began.
        reference: a partition's expected state dict.
        in_memory_mb: past this many megabytes each update's weights are a part of their own, which is read where it lies.

    Raises:
        UpdateError: too few good updates.
    """
    keep = federation.keep
    if answered(keep, round):
        kept = Received.from_state_dict(keep.load(round, UPDATES), partial(taken_out, keep, round))
        for error in kept.excluded:
            federation.watch.excluded(error)
        return kept
    bad, sent = list[UpdateError](), dict[int, int]()

    def excluded(error: UpdateError) -> None:
        bad.append(error)
        federation.watch.excluded(error)

    apart = sum(size_of(reference(partition)) for partitions in plan.asked.values() for partition in partitions) > 1e6 * in_memory_mb
    # They stay for the whole round, and the memory that they came in may be the runner's: Ray's object store, say.
    good = []
    for answer in collect(replies, plan.asked, round, reference, plan.minimum, excluded, left_out=plan.left_out):
        sent |= answer.sent
        for update in answer.updates:
            if apart:
                weights = dict(put_away(keep, round, update.partition, update.weights))
            else:
                weights = {name: tensor.clone() for name, tensor in update.weights.items()}
            good.append(replace(update, weights=weights))
    received = Received(good, bad, time.monotonic() - started, sent, apart)
    keep.save(round, UPDATES, received.state_dict())
    return received
