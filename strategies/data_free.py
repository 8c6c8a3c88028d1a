"""Data-free ensemble distillation: the clients' models become an ensemble, impressions are mined from it, and a student learns from them.

One round of it is one-shot federated learning in the sense of DENSE (Zhang et al., NeurIPS 2022), with the generator replaced by any
synthesizer. Several methods can be compared on the same updates; the first one's student is the global model that a next round starts from.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import placed
from fedimpr.distillation import Distillation, Mining, mine_and_distil
from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError
from fedimpr.impressions import Bank, Source
from fedimpr.observation import compiled
from fedimpr.states import size_of, under
from fedimpr.synthesis import Synthesizer
from fedimpr.update import Update, average
from strategies.cohort import roll_call
from strategies.federation import Federation, alike, instructions, loaded
from strategies.keep import Part
from strategies.plan import Ledger, planned
from strategies.receiving import receive
from strategies.tensors import from_arrays, to_arrays
from strategies.watch import Cost

Weighting = Literal["uniform", "examples", "label_counts"]


@dataclass(kw_only=True)
class Method:
    """One way to a student.

    Attributes:
        synthesizer: mines the impressions.
        mining: how many, and when.
    """

    synthesizer: Synthesizer
    mining: Mining


class DataFree(Strategy):
    """Ensemble the updates, mine impressions from the ensemble, distil it into the global model.

    Args:
        federation: who takes part.
        methods: by name; the first one's student becomes the global model.
        distillation: how students learn.
        weighting: of the ensemble's members: ``"uniform"``, by number of ``"examples"``, or per class by ``"label_counts"``, which
            clients must consent to send.
        weightings_beside: others, whose ensembles are shown beside that one and teach nobody.
        minimum_updates: good updates below which a round fails; ``None``: as many as were asked.
        updates_in_memory_mb: MB (millions of bytes) of models that a round's clients may hold in the server's memory, >= 0. Where they send
            more, each goes to a file as it comes, the ensemble reads it from there, and members compute in turn. On a GPU they are all in
            its memory.
        timeout: seconds to wait for the clients of a round.
    """

    def __init__(
        self,
        *,
        federation: Federation,
        methods: Mapping[str, Method],
        distillation: Distillation,
        weighting: Weighting,
        weightings_beside: tuple[Weighting, ...],
        minimum_updates: int | None,
        updates_in_memory_mb: float,
        timeout: float,
    ) -> None:
        if not updates_in_memory_mb >= 0:
            raise ConfigError("strategy.updates_in_memory_mb", updates_in_memory_mb, "a number >= 0")
        if not methods:
            raise ConfigError("synthesis", "nothing", "one method or more, e.g. synthesis=[di,cmi]")
        self.federation, self.methods, self.distillation = federation, dict(methods), distillation
        federation.check_minimum(minimum_updates)
        self.weighting, self.minimum_updates, self.timeout = weighting, minimum_updates, timeout
        self.updates_in_memory_mb = updates_in_memory_mb
        self.weightings_beside = [other for other in weightings_beside if other != weighting]
        self.banks = {name: Bank(method.mining.capacity) for name, method in methods.items()}
        self.nodes: list[int] = []  # in the order of places
        self.asked: dict[int, list[int]] = {}  # this round's partitions by node
        self.ledger = Ledger(federation)
        self.started = time.monotonic()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message a node of the round's cohort: the global weights, the round and the settings.

        Raises:
            UpdateError: too few of the cohort's devices can answer.
        """
        self.started = time.monotonic()
        self.nodes = self.nodes or roll_call(grid, self.federation.nodes)
        self.sent = from_arrays(arrays)
        self.plan = planned(self.federation, self.nodes, server_round, self.minimum_updates, size_of(self.sent))
        self.asked = self.plan.asked
        return instructions(self.federation, self.asked, self.sent, server_round)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The round's student of the first method, and how many updates were good.

        Raises:
            UpdateError: too few good updates.
        """
        fed, watch = self.federation, self.federation.watch
        received = receive(fed, replies, self.plan, server_round, self.started, fed.reference, in_memory_mb=self.updates_in_memory_mb)
        updates = received.updates
        members = [placed(loaded(fed.build(update.partition), update.weights, shared=received.apart), fed.device) for update in updates]
        for update in updates:
            watch.update(server_round, update, self.plan.charge(update.partition, received.sent))
        bill = self.ledger.bill(sum(self.plan.down.values()), sum(received.sent.values()), self.plan.seconds)
        watch.answered(server_round, len(updates), received.seconds, bill)
        if all(alike(update.weights, self.sent) for update in updates):
            start = time.monotonic()
            mean = placed(loaded(fed.build(None), average(updates)), fed.device)
            watch.candidate(server_round, "one-shot FedAvg" if server_round == 1 else "FedAvg", mean, Cost(time.monotonic() - start))

        def ensemble_of(weighting: Weighting) -> Ensemble:
            start = time.monotonic()
            batched = False if received.apart else None  # batching would make a copy of all members
            ensemble = Ensemble(members, weights_of(updates, weighting), batched=batched).to(fed.device)
            watch.candidate(server_round, f"{weighting} ensemble", ensemble, Cost(time.monotonic() - start))
            return ensemble

        ensemble = ensemble_of(self.weighting)  # the first to be told is the one that the others are measured by
        for other in self.weightings_beside:
            ensemble_of(other)
        students = fed.crew.work(
            server_round, {_part(name): functools.partial(self._student, name, ensemble, server_round) for name in self.methods}
        )
        return to_arrays(next(iter(students.values())).cpu().state_dict()), MetricRecord({"updates": len(updates)})

    def _student(self, name: str, ensemble: Ensemble, round: int) -> nn.Module:
        fed, method, bank = self.federation, self.methods[name], self.banks[name]
        student = placed(loaded(fed.build(None), self.sent), fed.device)
        with compiled(fed.compile):
            spent = mine_and_distil(
                ensemble,
                student,
                method.synthesizer,
                mining=method.mining,
                distillation=self.distillation,
                bank=bank,
                source=Source(f"ensemble of {len(ensemble)}", name, round, fed.seed),
                shape=fed.shape,
                generator=seeds.generator(fed.seed, f"server/{name}", round),
                progress=lambda stage, done, total, **info: fed.watch.progress(f"{stage} {name}", done, total, **info),
                saves=Part(fed.keep, round, _part(name)),
            )
        cost = Cost(
            seconds=spent.mining_seconds + spent.distilling_seconds,
            images=method.mining.images,
            mining_seconds=spent.mining_seconds,
            mining_passes=spent.mining_passes,
            teacher_passes=spent.teacher_passes,
            steps=self.distillation.steps,
            batch=self.distillation.batch_size,
        )
        fed.watch.mined(round, name, bank, ensemble)
        fed.watch.candidate(round, f"student by {name.upper()}", student, cost)
        return student

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No client evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing to aggregate."""

    def summary(self) -> None:
        """Nothing to log: the watch is told everything."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round needs beside the global weights: every method's memory and bank, and what the rounds have cost."""
        state = self.ledger.state_dict()
        for name, method in self.methods.items():
            state |= {f"{name}/synthesizer/{key}": value for key, value in method.synthesizer.state_dict().items()}
            state |= {f"{name}/bank/{key}": value for key, value in self.banks[name].state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.ledger.load_state_dict(state)
        for name, method in self.methods.items():
            method.synthesizer.load_state_dict(under(state, f"{name}/synthesizer/"))
            held = under(state, f"{name}/bank/")
            self.banks[name].load_state_dict({key: value.to(self.federation.device) for key, value in held.items()})


def _part(method: str) -> str:
    """The part of a round that keeps a method's student, finished or not."""
    return f"student by {method}"


def weights_of(updates: Sequence[Update], weighting: Weighting) -> Tensor | None:
    """The weights of an ensemble's members, (M,), or (M, K) by class; ``None`` where all are equal.

    Raises:
        ConfigError: label counts are wanted, and a client sent none.
    """
    if weighting == "uniform":
        return None
    if weighting == "examples":
        return torch.tensor([update.examples for update in updates])
    silent = [update.partition for update in updates if update.label_counts is None]
    if silent:
        raise ConfigError(
            "strategy.weighting", "label_counts", f"that clients consent: client {silent[0]} sent none; set send_label_counts=true"
        )
    return torch.stack([update.label_counts for update in updates if update.label_counts is not None])
