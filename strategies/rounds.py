"""The loop of a federation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from strategies.adapting import Adapting
from strategies.continual import Continual
from strategies.data_free import DataFree
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff
from strategies.keep import answered
from strategies.tensors import from_arrays, to_arrays

Resumable = Adapting | Continual | DataFree | FedAvg | FedBuff
POLL = 0.05  # seconds between two looks for a reply


def run_rounds(
    strategy: Resumable,
    grid: Grid,
    weights: dict[str, Tensor],
    *,
    first: int,
    last: int,
    after_round: Callable[[int, dict[str, Tensor]], None],
) -> dict[str, Tensor]:
    """Send, train, aggregate, for every round from ``first`` to ``last``; return the global weights.

    Nothing is sent in a round whose updates are kept (:class:`~strategies.keep.Keep`).

    This is the loop of Flower's ``Strategy.start``, which can neither begin at a later round nor tell when one is over.

    Args:
        strategy: any Flower strategy with a ``timeout``.
        grid: the federation.
        weights: global weights before ``first``.
        first: counted from 1.
        last: included.
        after_round: told the round and its weights, e.g. to write them down.
    """
    for round in range(first, last + 1):
        strategy.federation.watch.began(round)
        arrays = to_arrays(weights)
        messages = list(strategy.configure_train(round, arrays, ConfigRecord(), grid))
        # Nobody is asked twice: a run that was stopped after its clients had answered has kept their updates.
        if answered(strategy.federation.keep, round):
            replies: Iterator[Message] = iter(())
        else:
            clients = list(map(len, strategy.asked.values()))
            replies = exchange(grid, messages, clients, strategy.timeout, strategy.federation.watch.progress)
        aggregated, _ = strategy.aggregate_train(round, replies)
        weights = from_arrays(aggregated)
        after_round(round, weights)
    return weights


def exchange(
    grid: Grid, messages: Sequence[Message], clients: Sequence[int], timeout: float, progress: Callable[..., None]
) -> Iterator[Message]:
    """Send messages and give out the replies in their order as they come: who sums them up needs no memory for them all.

    Args:
        grid: the federation.
        messages: one a node, or several.
        clients: how many each of them asks.
        timeout: seconds, from the first reply that is asked for; replies that have not come by then are left out.
        progress: told after every reply.
    """
    deadline, done = time.monotonic() + timeout, 0
    progress("training clients", 0, sum(clients))
    for message, message_id, asked in zip(messages, grid.push_messages(messages), clients, strict=True):
        while not (found := list(grid.pull_messages([message_id]))) and time.monotonic() < deadline:
            time.sleep(POLL)
        done += asked * len(found)
        progress("training clients", done, sum(clients))  # now: nobody may ask for more after the last reply
        for reply in found:
            # For a node that has gone Flower answers in its own name.
            named = reply.metadata.src_node_id == message.metadata.dst_node_id or not reply.has_error()
            yield reply if named else Message(reply.error, reply_to=message)
