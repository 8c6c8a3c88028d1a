"""The loop of a federation."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from strategies.data_free import DataFree
from strategies.fedavg import FedAvg

Resumable = DataFree | FedAvg


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
        arrays = ArrayRecord(weights)
        messages = strategy.configure_train(round, arrays, ConfigRecord(), grid)
        replies = grid.send_and_receive(messages, timeout=strategy.timeout)
        aggregated, _ = strategy.aggregate_train(round, replies)
        weights = aggregated.to_torch_state_dict()
        after_round(round, weights)
    return weights
