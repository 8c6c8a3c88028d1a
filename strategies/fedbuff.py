"""Federated learning with buffered asynchronous aggregation.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: *Federated Learning with Buffered Asynchronous Aggregation*, AISTATS 2022 (arXiv
2106.06639), algorithm 1: clients train at their own pace, and after every K updates the server moves by their mean difference from the
weights that each had been sent, weighted by staleness.

What differs: time is the virtual clock of ``devices=...``, so that a run repeats. A client whose update waits in the buffer is not drawn
again before the step: a step takes K clients, and with K = concurrency = clients it is a synchronous round, averaged uniformly. Buffers of
the network, such as running variances, are averaged by the same weights and not moved by differences, after which they need not be
variances any more.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedimpr.errors import ConfigError
from fedimpr.states import size_of, under
from strategies.cohort import by_node, collect, roll_call
from strategies.federation import Federation, instructions, loaded
from strategies.plan import Ledger, lost, tell_unable
from strategies.schedule import Step, steps
from strategies.tensors import from_arrays, to_arrays
from strategies.watch import Charge, Cost

Staleness = Literal["square_root", "constant"]
Address = tuple[int, str]  # a node, and the round and version that it is asked for


class FedBuff(Strategy):
    """Move the weights by buffered differences; a round is a server step.

    As many clients train at the same time as take part in a synchronous round: the federation's ``cohort``, or all.

    Args:
        federation: who takes part; it needs a fleet.
        buffer: updates that a server step takes, K >= 1.
        rate: the server's learning rate, > 0.
        staleness: the weight of an update during whose making tau server steps were made: ``"square_root"`` is 1 / sqrt(1 + tau),
            ``"constant"`` is 1.
        maximum_staleness: tau above which an update is thrown away; ``None``: never.
        minimum_updates: good updates of a step below which the run fails; ``None``: K.
        timeout: seconds of real time to wait for the clients of a step.
    """

    def __init__(
        self,
        *,
        federation: Federation,
        buffer: int,
        rate: float,
        staleness: Staleness,
        maximum_staleness: int | None,
        minimum_updates: int | None,
        timeout: float,
    ) -> None:
        if federation.fleet is None:
            raise ConfigError("devices.kinds", None, "those of a profile, e.g. devices=phones: FedBuff lives on their virtual clock")
        able = sum(map(federation.fleet.able, range(federation.clients)))
        if not 1 <= buffer <= able:
            raise ConfigError("strategy.buffer", buffer, f"an integer in [1, {able}], the clients with devices that can train")
        if not 0 < rate < math.inf:
            raise ConfigError("strategy.rate", rate, "a number > 0")
        if maximum_staleness is not None and maximum_staleness < 0:
            raise ConfigError("strategy.maximum_staleness", maximum_staleness, "null or an integer >= 0")
        if minimum_updates is not None and not 1 <= minimum_updates <= buffer:
            raise ConfigError("strategy.minimum_updates", minimum_updates, f"null or an integer in [1, {buffer}], the updates of a step")
        self.federation, self.fleet, self.timeout = federation, federation.fleet, timeout
        self.buffer, self.rate, self.staleness, self.maximum_staleness = buffer, rate, staleness, maximum_staleness
        self.minimum_updates = buffer if minimum_updates is None else minimum_updates
        self.nodes: list[int] = []  # in the order of places
        self.asked: dict[Address, list[int]] = {}  # this step's partitions
        self.schedule: Iterator[Step] | None = None
        self.versions: dict[int, dict[str, Tensor]] = {}  # global weights by steps made; those that somebody is still at work from
        self.ledger = Ledger(federation)
        self.started = time.monotonic()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message a node and version: the weights that the clients had been sent whose updates this step takes.

        Raises:
            UpdateError: no client can be reached.
        """
        self.started, fed = time.monotonic(), self.federation
        self.nodes = self.nodes or roll_call(grid, fed.nodes)
        self.versions[server_round - 1] = from_arrays(arrays)
        if self.schedule is None:
            every = steps(self.fleet, concurrency=fed.most, buffer=self.buffer, maximum_staleness=self.maximum_staleness)
            self.schedule = itertools.islice(every, server_round - 1, None)
        self.step = next(self.schedule)
        if server_round == 1:
            tell_unable(fed)
        for flight, cause in self.step.lost:
            fed.watch.excluded(lost(flight.partition, server_round, cause))
        messages, self.asked = list[Message](), {}
        for version in sorted({flight.version for flight in self.step.arrived}):
            partitions = sorted(flight.partition for flight in self.step.arrived if flight.version == version)
            asked, group = by_node(fed, self.nodes, partitions), f"{server_round}/{version}"
            messages += instructions(fed, asked, self.versions[version], server_round, group=group)
            self.asked |= {(node, group): hosted for node, hosted in asked.items()}
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The weights after the step, and how many updates were good.

        Raises:
            UpdateError: too few good updates.
        """
        fed, count, watching, up = self.federation, 0, 0.0, dict[int, int]()
        now, flights = self.versions[server_round - 1], {flight.partition: flight for flight in self.step.arrived}
        model, size = fed.build(None), size_of(now)
        moved = Moved({name for name, _ in model.named_parameters()})
        for answer in collect(
            replies, self.asked, server_round, lambda _: fed.reference(None), self.minimum_updates, fed.watch.excluded, address=_address
        ):
            up |= answer.sent
            for update in answer.updates:
                flight = flights[update.partition]
                stale = server_round - 1 - flight.version
                weight = 1 / math.sqrt(1 + stale) if self.staleness == "square_root" else 1.0
                moved.add(update.weights, self.versions[flight.version], weight)
                count, start = count + 1, time.monotonic()
                fed.watch.update(server_round, update, Charge(size, up[update.partition], flight.turn.device, flight.turn.seconds, stale))
                watching += time.monotonic() - start
        thrown = sum(self.fleet.loads[flight.partition].up for flight, _ in self.step.lost if flight.turn.cause is None)
        bill = self.ledger.bill(size * len(self.step.begun), sum(up.values()) + thrown, self.step.seconds)
        fed.watch.answered(server_round, count, time.monotonic() - self.started - watching, bill)
        start = time.monotonic()
        weights = moved.weights(now, self.rate)
        self.versions = {version: old for version, old in self.versions.items() if version in self.step.waiting}
        fed.watch.candidate(server_round, "FedBuff", loaded(model, weights).to(fed.device), Cost(time.monotonic() - start))
        return to_arrays(weights), MetricRecord({"updates": count})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No client evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing to aggregate."""

    def summary(self) -> None:
        """Nothing to log: the watch is told everything."""

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that somebody is still at work from, and what the rounds have cost; the schedule follows from the settings."""
        old = {f"version/{version}/{name}": tensor for version, weights in self.versions.items() for name, tensor in weights.items()}
        return {**self.ledger.state_dict(), **old}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.ledger.load_state_dict(state)
        versions = {int(key.split("/")[1]) for key in state if key.startswith("version/")}
        self.versions = {version: under(state, f"version/{version}/") for version in versions}


class Moved:
    """Where a buffer of updates moves the weights: sums in float64, which depend on the order of the updates in their last bits.

    Args:
        parameters: the names of those that move by differences; all others are averaged.
    """

    def __init__(self, parameters: set[str]) -> None:
        self.parameters = parameters
        self.sums: dict[str, Tensor] = {}
        self.count, self.weight = 0, 0.0

    def add(self, weights: Mapping[str, Tensor], origin: Mapping[str, Tensor], weight: float) -> None:
        """Take in an update, the weights that it started from, and how much it counts, in (0, 1]."""
        for name, tensor in weights.items():
            term = tensor.double() - origin[name].double() if name in self.parameters else tensor.double()
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + weight * term
        self.count, self.weight = self.count + 1, self.weight + weight

    def weights(self, now: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """The weights after a step of ``rate`` along the mean of what was added, one update or more; integer buffers are rounded."""
        new = {}
        for name, tensor in now.items():
            moved = tensor.double() + rate * self.sums[name] / self.count if name in self.parameters else self.sums[name] / self.weight
            new[name] = (moved if tensor.is_floating_point() else moved.round()).to(tensor.dtype)
        return new


def _address(reply: Message) -> Address:
    return reply.metadata.src_node_id, reply.metadata.group_id
