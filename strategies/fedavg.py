"""Federated averaging.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS
2017 (arXiv 1602.05629), algorithm 1. Unlike Flower's strategy of the same name it sums in the order of
partitions and in float64, so that a run repeats, and refuses to average what is not finite.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedimpr.errors import ConfigError
from fedimpr.states import size_of
from fedimpr.update import Average
from strategies.cohort import collect, roll_call
from strategies.federation import Federation, instructions, loaded
from strategies.plan import Ledger, planned
from strategies.tensors import from_arrays, to_arrays
from strategies.watch import Cost


class FedAvg(Strategy):
    """Average the updates by number of examples.

    Args:
        federation: who takes part.
        partial_sums: whether nodes send the sum of their clients' updates instead of each: less to send and to add up. Then nobody sees
            an update, and the sum's last bits depend on how many clients a node hosts. Devices have nodes of their own and send no sums.
        minimum_updates: good updates below which a round fails; ``None``: as many as were asked.
        timeout: seconds to wait for the clients of a round.
    """

    def __init__(self, *, federation: Federation, partial_sums: bool, minimum_updates: int | None, timeout: float) -> None:
        if partial_sums and federation.fleet is not None:
            raise ConfigError("strategy.partial_sums", True, "false with devices: each of them sends an update of its own")
        federation.check_minimum(minimum_updates)
        self.partial_sums = partial_sums
        self.federation, self.minimum_updates, self.timeout = federation, minimum_updates, timeout
        self.nodes: list[int] = []  # in the order of places
        self.asked: dict[int, list[int]] = {}  # this round's partitions by node
        self.ledger = Ledger(federation)
        self.started = time.monotonic()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message a node of the round's cohort: the global weights, the round and the settings.

        Raises:
            UpdateError: too few of the cohort's devices can answer.
        """
        self.started, weights = time.monotonic(), from_arrays(arrays)
        self.nodes = self.nodes or roll_call(grid, self.federation.nodes)
        self.plan = planned(self.federation, self.nodes, server_round, self.minimum_updates, size_of(weights))
        self.asked = self.plan.asked
        return instructions(self.federation, self.asked, weights, server_round, sums=self.partial_sums)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The average of the good updates, and how many there were.

        Raises:
            UpdateError: too few good updates.
        """
        fed, mean, count, watching = self.federation, Average(), 0, 0.0
        up: dict[int, int] = {}
        for answer in collect(
            replies,
            self.asked,
            server_round,
            lambda _: fed.reference(None),
            self.plan.minimum,
            fed.watch.excluded,
            sums=self.partial_sums,
            left_out=self.plan.left_out,
        ):
            up |= answer.sent
            if answer.sums is not None and answer.updates:
                mean.add_sums(answer.sums, sum(update.examples for update in answer.updates))
            for update in answer.updates:
                if answer.sums is None:
                    mean.add(update)
                count, start = count + 1, time.monotonic()
                fed.watch.update(server_round, update, self.plan.charge(update.partition, up))
                watching += time.monotonic() - start
        bill = self.ledger.bill(sum(self.plan.down.values()), sum(up.values()), self.plan.seconds)
        fed.watch.answered(server_round, count, time.monotonic() - self.started - watching, bill)
        start = time.monotonic()
        weights = mean.weights(fed.reference(None))
        fed.watch.candidate(server_round, "FedAvg", loaded(fed.build(None), weights).to(fed.device), Cost(time.monotonic() - start))
        return to_arrays(weights), MetricRecord({"updates": count})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No client evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing to aggregate."""

    def summary(self) -> None:
        """Nothing to log: the watch is told everything."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the rounds have cost: the global weights are all there is beside it."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.ledger.load_state_dict(state)
