"""Domain adaptation across clients: source clients hold labelled images, target clients hold images of other domains and no labels.

First the source clients train, for one round or for several of federated averaging. Then the target clients look at the source models
with their own images and answer how useful each is, and with what batch-norm statistics. Now the server mines impressions of every useful
source model, which stand in for the source clients' images. In all further rounds the target clients adapt: on their own images and on what
a method needs of impressions and source models. No image leaves a client.

Several methods can be compared on the same sources and the same impressions: each has a model of its own, from the same start. The first
one's is the global model.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedimpr.adaptation import Adaptation, statistics_of, usefulness
from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, UpdateError
from fedimpr.states import from_note, size_of, to_note, under
from fedimpr.update import Update, average
from strategies.cohort import collect, roll_call
from strategies.data_free import Method
from strategies.federation import Federation, instructions, loaded
from strategies.keep import UPDATES, Received
from strategies.mined import Mined
from strategies.plan import Ledger, planned
from strategies.targets import Domains, sources_of, targets_of
from strategies.tensors import from_arrays, to_arrays
from strategies.watch import Charge, Cost

SURVEY = "survey"  # the work of a target client that looks at the source models
Address = tuple[int, str]  # a node, and what it is asked for


@dataclass(frozen=True)
class Row:
    """One adapted model.

    Attributes:
        name: for people.
        adaptation: its name in the settings.
        synthesis: the method whose impressions it gets; ``None`` where it needs none.
    """

    name: str
    adaptation: str
    synthesis: str | None


class Adapting(Strategy):
    """Train on the sources, survey, mine, adapt on the targets.

    Args:
        federation: who takes part; without devices.
        adaptations: by name; the first one's model becomes the global one. Those that need impressions are done with those of each method.
        methods: synthesis methods by name, each of which mines its number of images from each source model.
        domains: the clients of each domain.
        rounds: of the whole run.
        targets: the clients that have no labels: names of domains, or numbers of clients.
        sources: the clients that have labels, likewise; ``None``: all others.
        joins: by target, the first round it takes part in; nothing means from the start.
        source_rounds: rounds in which the source clients train, >= 1. The next one is the survey; all others adapt.
        start: the weights that adaptation starts from: those of the most useful source model (``"best"``), or all of them averaged by
            usefulness (``"merged"``).
        survey_batch: images in a pass that takes batch-norm statistics, >= 2.
        minimum_updates: good updates below which a round fails; ``None``: as many as were asked. Never more than there are to ask.
        timeout: seconds to wait for the clients of a round.
    """

    def __init__(
        self,
        *,
        federation: Federation,
        adaptations: Mapping[str, Adaptation],
        methods: Mapping[str, Method],
        domains: Domains,
        rounds: int,
        targets: tuple[str | int, ...],
        sources: tuple[str | int, ...] | None,
        joins: Mapping[str, int],
        source_rounds: int,
        start: Literal["best", "merged"],
        survey_batch: int,
        minimum_updates: int | None,
        timeout: float,
    ) -> None:
        if federation.fleet is not None:
            raise ConfigError("devices.kinds", "some", "devices=none: what a target's turn takes is not known to the virtual clock")
        if source_rounds < 1:
            raise ConfigError("strategy.source_rounds", source_rounds, "an integer >= 1")
        if rounds < source_rounds + 2:
            raise ConfigError("rounds", rounds, f"{source_rounds + 2} or more: strategy.source_rounds, one to survey, and one to adapt")
        if survey_batch < 2:
            raise ConfigError("strategy.survey_batch", survey_batch, "an integer >= 2")
        federation.check_minimum(minimum_updates)
        self.federation, self.adaptations = federation, dict(adaptations)
        self.source_rounds, self.starting = source_rounds, start
        self.minimum_updates, self.timeout = minimum_updates, timeout
        self.targets = targets_of(targets, joins, domains, federation.clients)
        self.clients = sources_of(sources, self.targets, domains, federation.clients)
        if min(self.targets.values()) > source_rounds + 1:
            raise ConfigError("strategy.joins", dict(joins), f"one target at least in round {source_rounds + 1}, the survey")
        if late := [client for client, round in self.targets.items() if round > rounds]:
            raise ConfigError("strategy.joins", dict(joins), f"rounds in [1, {rounds}]; client {late[0]} would never take part")
        model = federation.build(None)
        for name, adaptation in adaptations.items():
            try:
                adaptation.check(model)
            except ConfigError as error:
                raise ConfigError(error.key, error.value, f"{error.allowed} (for adaptation={name})") from None
        self.rows = rows_of(self.adaptations, methods)
        # What the rounds so far have made; see state_dict.
        self.sources: list[Update] = []  # those of the last source round
        self.weights = torch.zeros(0)  # of the sources
        wanted = dict.fromkeys(row.synthesis for row in self.rows if row.synthesis is not None)
        self.mined = {name: Mined(federation, name, methods[name], len(self.clients)) for name in wanted}
        self.adapted: dict[str, dict[str, Tensor]] = {}  # by row
        self.nodes: list[int] = []  # in the order of places
        self.asked: dict[Address, list[int]] = {}  # this round's partitions by message
        self.ledger = Ledger(federation)
        self.started = time.monotonic()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message a node to train its sources, or to survey with its targets, or one for each adapted model."""
        self.started, fed, weights = time.monotonic(), self.federation, from_arrays(arrays)
        self.nodes = self.nodes or roll_call(grid, fed.nodes)
        there = [client for client, joined in self.targets.items() if joined <= server_round]
        if server_round <= self.source_rounds:
            asking, among = {"": ("", weights, dict[str, Tensor]())}, self.clients
        elif server_round == self.source_rounds + 1:
            asking, among = {SURVEY: (SURVEY, weights, self._models(range(len(self.sources))))}, there
        else:
            asking, among = {row.name: (row.adaptation, self.adapted[row.name], self._beside(row)) for row in self.rows}, there
        self.sizes = {name: size_of(sent) + size_of(beside) for name, (_, sent, beside) in asking.items()}
        minimum = None if self.minimum_updates is None else min(self.minimum_updates, len(among))
        self.plan = planned(fed, self.nodes, server_round, minimum, sum(self.sizes.values()), among)
        messages, self.asked = list[Message](), {}
        for name, (work, sent, beside) in asking.items():
            group = _group(server_round, name)
            messages += instructions(fed, self.plan.asked, sent, server_round, group=group, beside=beside, work=work)
            self.asked |= {(node, group): partitions for node, partitions in self.plan.asked.items()}
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The sources' average, the weights that adaptation starts from, or the first method's model; and how many updates were good.

        Raises:
            UpdateError: too few good updates.
        """
        if server_round <= self.source_rounds:
            weights, count = self._trained(server_round, replies)
        elif server_round == self.source_rounds + 1:
            weights, count = self._surveyed(server_round, replies)
        else:
            weights, count = self._adapted(server_round, replies)
        return to_arrays(weights), MetricRecord({"updates": count})

    def _trained(self, round: int, replies: Iterable[Message]) -> tuple[dict[str, Tensor], int]:
        """A round of the sources."""
        fed = self.federation
        received = self._collected(round, "", replies, lambda _: fed.reference(None))
        self.sources = list(received.updates)
        self._tell(round, {"": received})
        start = time.monotonic()
        weights = average(self.sources)
        fed.watch.candidate(round, "FedAvg of the sources", self._model(weights), Cost(time.monotonic() - start))
        return weights, len(self.sources)

    def _surveyed(self, round: int, replies: Iterable[Message]) -> tuple[dict[str, Tensor], int]:
        """What the targets think of the sources, and all that follows from it."""
        fed, count = self.federation, len(self.sources)
        models = [self._model(update.weights) for update in self.sources]
        kept = statistics_of(fed.build(None))
        reference = {f"{place}/{name}": tensor for place in range(count) for name, tensor in kept.items()}
        if fed.keep.holds(round, UPDATES):
            received = Received.from_state_dict(fed.keep.load(round, UPDATES))
            for error in received.excluded:
                fed.watch.excluded(error)
        else:
            received = self._collected(round, SURVEY, replies, lambda _: reference)
            fed.keep.save(round, UPDATES, received.state_dict())
        self._bill(round, {SURVEY: received})
        self.weights = self._usefulness(received.updates)
        fed.watch.sources(round, [update.partition for update in self.sources], models, self.weights)
        fed.watch.candidate(round, "uniform ensemble", Ensemble(models).to(fed.device), Cost(0.0))
        fed.watch.candidate(round, "ensemble by usefulness", Ensemble(models, self.weights).to(fed.device), Cost(0.0))
        moved = list[nn.Module]()
        if reference:
            seen = average(received.updates)
            moved = [self._model({**update.weights, **under(seen, f"{place}/")}) for place, update in enumerate(self.sources)]
            fed.watch.candidate(round, "ensemble with target batch norm", Ensemble(moved).to(fed.device), Cost(0.0))
        alike = Ensemble(models, mean="probabilities").to(fed.device)
        fed.watch.candidate(round, "uniform ensemble of probabilities", alike, Cost(0.0))
        voices = self.weights.repeat(2) if moved else self.weights  # as they are, and as the targets' statistics have them
        both = Ensemble([*models, *moved], voices, mean="probabilities").to(fed.device)
        fed.watch.candidate(round, "ensemble of probabilities by usefulness", both, Cost(0.0))
        start = self._start()
        fed.watch.candidate(round, "start of the adaptation", self._model(start), Cost(0.0))
        useful = self._useful()
        clients, chosen = [self.sources[place].partition for place in useful], [models[place] for place in useful]
        fed.crew.work(round, {mined.part: functools.partial(mined.mine, round, clients, chosen) for mined in self.mined.values()})
        for name, mined in self.mined.items():
            fed.watch.mined(round, name, mined.bank, Ensemble(chosen, self.weights[useful]).to(fed.device))
        self.adapted = {row.name: start for row in self.rows}
        return start, len(received.updates)

    def _adapted(self, round: int, replies: Iterable[Message]) -> tuple[dict[str, Tensor], int]:
        """A round of the targets."""
        fed, waiting, received = self.federation, list(replies), dict[str, Received]()
        for row in self.rows:
            group = _group(round, row.name)
            own = [reply for reply in waiting if reply.metadata.group_id == group]
            received[row.name] = self._collected(round, row.name, own, lambda _: fed.reference(None))
        self._tell(round, received)
        for row in self.rows:
            self.adapted[row.name] = average(received[row.name].updates)
            seconds = max(update.metrics.get("seconds", 0.0) for update in received[row.name].updates)
            cost = replace(self.mined[row.synthesis].cost if row.synthesis else Cost(0.0), seconds=seconds)
            fed.watch.candidate(round, f"adapted by {row.name}", self._model(self.adapted[row.name]), cost)
        first = self.rows[0].name
        return self.adapted[first], len(received[first].updates)

    def _collected(self, round: int, name: str, replies: Iterable[Message], reference: object) -> Received:
        """The good updates that came for one model."""
        fed, bad, good, sent = self.federation, list[UpdateError](), list[Update](), dict[int, int]()

        def excluded(error: UpdateError) -> None:
            bad.append(error)
            fed.watch.excluded(error)

        group = _group(round, name)
        asked = {address: partitions for address, partitions in self.asked.items() if address[1] == group}
        for answer in collect(replies, asked, round, reference, self.plan.minimum, excluded, address=_address):  # type: ignore[arg-type]
            sent |= answer.sent
            # The memory that they came in may be the runner's.
            good += [replace(u, weights={key: tensor.clone() for key, tensor in u.weights.items()}) for u in answer.updates]
        return Received(good, bad, time.monotonic() - self.started, sent)

    def _tell(self, round: int, received: Mapping[str, Received]) -> None:
        """Tell the watch of every client once, whatever it trained; where that is several models, its numbers say of which they are."""
        by_client: dict[int, Update] = {}
        for name, part in received.items():
            for update in part.updates:
                metrics = {f"{name}/{key}" if name else key: value for key, value in update.metrics.items()}
                first = by_client.setdefault(update.partition, replace(update, metrics={}))
                first.metrics.update(metrics)
        for partition in sorted(by_client):
            self.federation.watch.update(round, by_client[partition], self._charge(partition, received))
        self._bill(round, received)

    def _charge(self, partition: int, received: Mapping[str, Received]) -> Charge:
        return Charge(self.plan.down[partition], sum(part.sent.get(partition, 0) for part in received.values()))

    def _bill(self, round: int, received: Mapping[str, Received]) -> None:
        up = sum(sum(part.sent.values()) for part in received.values())
        count = len({update.partition for part in received.values() for update in part.updates})
        seconds = max(part.seconds for part in received.values())
        self.federation.watch.answered(round, count, seconds, self.ledger.bill(sum(self.plan.down.values()), up, 0.0))

    def _usefulness(self, surveys: Sequence[Update]) -> Tensor:
        """(M,), sum 1: of what the targets told, averaged by their numbers of images."""
        count, images = len(self.sources), sum(update.examples for update in surveys)

        def mean(key: str) -> float:
            return sum(update.examples * update.metrics[key] for update in surveys) / images

        information = torch.tensor([mean(f"information/{one}") for one in range(count)], dtype=torch.float64)
        agreement = torch.zeros(count, count, dtype=torch.float64)
        for one, two in itertools.combinations(range(count), 2):
            agreement[one, two] = agreement[two, one] = mean(f"agreement/{one}/{two}")
        return usefulness(information, agreement)

    def _start(self) -> dict[str, Tensor]:
        if self.starting == "best":
            return dict(self.sources[int(self.weights.argmax())].weights)
        # Whole numbers of examples, as an average takes them; below a millionth a source has no share.
        shares = (1e6 * self.weights).round().int().tolist()
        return average(replace(update, examples=share) for update, share in zip(self.sources, shares, strict=True) if share)

    def _useful(self) -> list[int]:
        """The places of the sources that have any weight."""
        return torch.nonzero(self.weights > 0).flatten().tolist()

    def _beside(self, row: Row) -> dict[str, Tensor]:
        """What a row's method needs; of sources without weight, nothing."""
        needs, useful = self.adaptations[row.adaptation].needs, self._useful()
        beside = {"weights": self.weights[useful].float()} if needs & {"impressions", "sources"} else {}
        if row.synthesis is not None:
            beside |= {f"impressions/{name}": tensor for name, tensor in self.mined[row.synthesis].beside().items()}
        return beside | (self._models(useful) if "sources" in needs else {})

    def _models(self, places: Iterable[int]) -> dict[str, Tensor]:
        """Source models by name, numbered from 0."""
        return {f"sources/{n}/{name}": t for n, place in enumerate(places) for name, t in self.sources[place].weights.items()}

    def _model(self, weights: Mapping[str, Tensor]) -> nn.Module:
        return loaded(self.federation.build(None), weights).to(self.federation.device)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No client evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing to aggregate."""

    def summary(self) -> None:
        """Nothing to log: the watch is told everything."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round needs beside the global weights: sources, their usefulness, impressions, all adapted models, the costs."""
        state = {**self.ledger.state_dict(), "weights": self.weights}
        facts = [{"partition": update.partition, "round": update.round, "examples": update.examples} for update in self.sources]
        state["sources"] = to_note(facts)
        for place, update in enumerate(self.sources):
            state |= {f"source/{place}/{key}": value for key, value in update.weights.items()}
        for name, mined in self.mined.items():
            state |= {f"mined/{name}/{key}": value for key, value in mined.state_dict().items()} if self.adapted else {}
        for place, row in enumerate(self.rows):
            state |= {f"adapted/{place}/{key}": value for key, value in self.adapted.get(row.name, {}).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.ledger.load_state_dict(state)
        self.weights = state["weights"]
        self.sources = [
            Update(**facts, weights=under(state, f"source/{place}/")) for place, facts in enumerate(from_note(state["sources"]))
        ]
        for name, mined in self.mined.items():
            if held := under(state, f"mined/{name}/"):
                mined.load_state_dict(held)
        self.adapted = {row.name: held for place, row in enumerate(self.rows) if (held := under(state, f"adapted/{place}/"))}


def rows_of(adaptations: Mapping[str, Adaptation], methods: Mapping[str, Method]) -> list[Row]:
    """The models to adapt: one a method, and for those that need impressions one for each way to mine them.

    Raises:
        ConfigError: there is no method, or one that needs impressions and no way to mine them.
    """
    if not adaptations:
        raise ConfigError("adaptation", "nothing", "one method or more, e.g. adaptation=[coral,shot]")
    rows = []
    for name, adaptation in adaptations.items():
        if "impressions" not in adaptation.needs:
            rows.append(Row(name, name, None))
        elif methods:
            rows += [Row(f"{name} with {method.upper()}", name, method) for method in methods]
        else:
            raise ConfigError("synthesis", "nothing", f"one method or more, e.g. synthesis=[di]: adaptation={name} learns from impressions")
    return rows


def _group(round: int, name: str) -> str:
    """What a round's messages for one model are called."""
    return f"{round}/{name}"


def _address(reply: Message) -> Address:
    return reply.metadata.src_node_id, reply.metadata.group_id
