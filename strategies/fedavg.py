"""Federated averaging.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS
2017 (arXiv 1602.05629), algorithm 1, with every client in every round. Unlike Flower's strategy of the same name it sums in the order of
partitions and in float64, so that a run repeats, and refuses to average what is not finite.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedimpr.update import average
from strategies.cohort import collect, roll_call
from strategies.federation import Federation, check_minimum, instructions, loaded
from strategies.watch import Cost


class FedAvg(Strategy):
    """Average the updates by number of examples.

    Args:
        federation: who takes part.
        minimum_updates: good updates below which a round fails.
        timeout: seconds to wait for the clients of a round.
    """

    def __init__(self, *, federation: Federation, minimum_updates: int, timeout: float) -> None:
        check_minimum(minimum_updates, federation.clients)
        self.federation, self.minimum_updates, self.timeout = federation, minimum_updates, timeout
        self.hosts: dict[int, int] = {}
        self.started = time.monotonic()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message a client: the global weights, the round and the settings."""
        self.started = time.monotonic()
        self.hosts = self.hosts or roll_call(grid, self.federation.clients)
        return instructions(self.federation, self.hosts, arrays.to_torch_state_dict(), server_round)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The average of the good updates, and how many there were.

        Raises:
            UpdateError: too few good updates.
        """
        fed = self.federation
        reference = fed.build(None).state_dict()
        updates = collect(replies, self.hosts, server_round, lambda _: reference, self.minimum_updates, fed.watch.excluded)
        members = [loaded(fed.build(None), update.weights).to(fed.device) for update in updates]
        fed.watch.updates(server_round, updates, members, time.monotonic() - self.started)
        start = time.monotonic()
        weights = average(updates)
        fed.watch.candidate(server_round, "FedAvg", loaded(fed.build(None), weights).to(fed.device), Cost(time.monotonic() - start))
        return ArrayRecord(weights), MetricRecord({"updates": len(updates)})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No client evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing to aggregate."""

    def summary(self) -> None:
        """Nothing to log: the watch is told everything."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: the global weights are all there is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
