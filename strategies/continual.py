"""Continual updates: tasks arrive one after another, and impressions of what the global model knows stand in for the tasks before.

The clients of a task are averaged (FedAvg), round after round. When a task is over, impressions are mined from the global model into a
bounded bank. In the tasks that follow, they are replayed by the clients beside their own images, as in TARGET (Zhang et al., ICCV 2023),
or by the server after the last round of a task. What keeps a model from forgetting is a :class:`~fedimpr.continual.rehearsal.Rehearsal`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.continual.course import Course
from fedimpr.continual.head import adjust, grown
from fedimpr.continual.rehearsal import Memory, Rehearsal
from fedimpr.data import Images
from fedimpr.devices import placed
from fedimpr.distillation import Distillation, mine, mine_and_distil
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Bank, Impressions, Source, place_in_group
from fedimpr.models import final_layer, in_every_turn
from fedimpr.observation import compiled
from fedimpr.states import size_of, under
from fedimpr.synthesis import NoisyLayerGenerator
from fedimpr.training import LocalTraining
from fedimpr.turns import QUARTERS, turned
from fedimpr.update import average
from strategies.cohort import roll_call
from strategies.data_free import Method
from strategies.federation import Federation, instructions, loaded
from strategies.keep import Part
from strategies.plan import Ledger, planned
from strategies.receiving import receive
from strategies.tensors import from_arrays, to_arrays
from strategies.watch import Cost

MEMORY, PREVIOUS = "memory/", "previous/"  # what travels beside the weights


class Continual(Strategy):
    """Average the clients of each task; mine impressions when it is over; replay them in the tasks that follow.

    Args:
        federation: who takes part.
        course: the tasks, and who works on them when.
        methods: by name; the first one mines. None where nothing is mined.
        distillation: how a student learns while impressions are mined, for methods that look at one.
        mines: of which classes impressions are kept when a task is over: of all that were ``"seen"``, first in, first out; or of those that
            the task brought, the ``"new"`` ones of a class-incremental stream, which join those of earlier tasks: each class of each task
            has the same share of the bank. All are mined in either case: what tells a class from the others shows only beside them.
        rehearsal: what is learnt so as not to forget.
        own_batch_size: own images that a step shows beside ``rehearsal.batch_size`` remembered ones: the model that answers is adjusted for
            how often each class was shown (:func:`fedimpr.continual.head.adjust`), and the one that goes on learning stays as it is.
            ``None``: no model is adjusted.
        replay: who replays: the ``"clients"`` in every round, or the ``"server"`` after the last round of a task.
        consolidation: how the server learns where it replays.
        student: whether a student learns while impressions are mined, as adversarial methods ask; it is thrown away.
        exemplars: images of earlier tasks that each client keeps, which no data-free method does: a number, or ``"all"``.
        minimum_updates: good updates below which a round fails; ``None``: as many as were asked.
        timeout: seconds to wait for the clients of a round.
    """

    def __init__(
        self,
        *,
        federation: Federation,
        course: Course,
        methods: Mapping[str, Method],
        distillation: Distillation,
        mines: Literal["seen", "new"],
        rehearsal: Rehearsal,
        own_batch_size: int | None,
        replay: Literal["clients", "server"],
        consolidation: LocalTraining | None,
        student: bool,
        exemplars: int | Literal["all"],
        minimum_updates: int | None,
        timeout: float,
    ) -> None:
        if replay == "server" and (consolidation is None or not methods):
            raise ConfigError("replay", replay, "clients, unless there is a consolidation and a method that mines")
        if replay == "server" and mines != "new":
            raise ConfigError("mines", mines, "new where the server replays: by then the model has forgotten the others")
        if own_batch_size is not None and own_batch_size < 1:
            raise ConfigError("own_batch_size", own_batch_size, "null, or an integer >= 1")
        if exemplars != "all" and exemplars < 0:
            raise ConfigError("exemplars", exemplars, "'all', or an integer >= 0")
        if federation.fleet is not None:
            raise ConfigError("devices", "some", "none where tasks arrive one after another: how long a turn takes is not known then")
        federation.check_minimum(minimum_updates)
        if rehearsal.names is not None and len(rehearsal.names) != len(course.order):
            allowed = f"a file with {len(course.order)} rows, one a class in the data set's order; it has {len(rehearsal.names)}"
            raise ConfigError("strategy.rehearsal.embeddings", rehearsal.embeddings, allowed)
        self.federation, self.course, self.distillation = federation, course, distillation
        self.name = next(iter(methods), "")
        self.method = methods.get(self.name)
        self.mines, self.rehearsal, self.replay, self.consolidation, self.student = mines, rehearsal, replay, consolidation, student
        self.own_batch_size, self.minimum_updates, self.timeout = own_batch_size, minimum_updates, timeout
        self.bank = Bank(1 if self.method is None else self.method.mining.capacity)
        self.previous: dict[str, Tensor] = {}  # the global weights at the end of the step before
        self.nodes: list[int] = []  # in the order of places
        self.asked: dict[int, list[int]] = {}  # this round's partitions by node
        self.ledger = Ledger(federation)
        self.started = time.monotonic()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message a node of those with work: the global weights, with a head for all classes known by now, and what is replayed.

        Raises:
            UpdateError: too few of the cohort can answer.
        """
        fed, course, step = self.federation, self.course, self.course.step(server_round)
        self.started, weights = time.monotonic(), from_arrays(arrays)
        self.nodes = self.nodes or roll_call(grid, fed.nodes)
        if course.begins(server_round):
            self.previous = weights if step else {}
        self.sent = grown(weights, fed.reference(None, course.classes(step)))
        beside = self._beside()
        size = size_of(self.sent) + size_of(beside)
        self.plan = planned(fed, self.nodes, server_round, self.minimum_updates, size, among=course.members(step))
        self.asked = self.plan.asked
        return instructions(fed, self.asked, self.sent, server_round, beside=beside)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The average, and how many updates there were. After a task's last round it has been through the server's replay, if there is one.

        Raises:
            UpdateError: too few good updates.
        """
        fed, step = self.federation, self.course.step(server_round)
        received = receive(fed, replies, self.plan, server_round, self.started, lambda _: self.sent, in_memory_mb=math.inf)
        for update in received.updates:
            fed.watch.update(server_round, update, self.plan.charge(update.partition, received.sent))
        bill = self.ledger.bill(sum(self.plan.down.values()), sum(received.sent.values()), self.plan.seconds)
        fed.watch.answered(server_round, len(received.updates), received.seconds, bill)
        start = time.monotonic()
        model = placed(loaded(fed.build(None, self.course.classes(step)), average(received.updates)), fed.device)
        answering = self._adjusted(model, step) if self.replay == "clients" else model
        fed.watch.candidate(server_round, "FedAvg", answering, Cost(time.monotonic() - start))
        if self.course.ends(server_round):
            if self.method is not None:
                self._mine(model, step, server_round)
            if self.replay == "server":
                start = time.monotonic()
                if step:
                    self._consolidate(model, step, server_round)
                answering = self._adjusted(model, step)
                fed.watch.candidate(server_round, f"server replay of {self.name.upper()}", answering, Cost(time.monotonic() - start))
        return to_arrays(model.cpu().state_dict()), MetricRecord({"updates": len(received.updates)})

    def _adjusted(self, model: nn.Module, step: int) -> nn.Module:
        """What answers for a model: itself, or one that allows for how often a step showed new classes and those before."""
        if self.own_batch_size is None or not step:
            return model
        known, brought = self.course.classes(step), torch.tensor(self.course.brought(step))
        often = torch.zeros(known).index_fill(0, brought, self.own_batch_size / len(brought))
        before = self.course.classes(step - 1)
        often[:before] += self.rehearsal.batch_size / before
        answering = copy.deepcopy(model)
        adjust(final_layer(answering), often.repeat_interleave(QUARTERS) if in_every_turn(model) is not model else often)
        return answering

    def _beside(self) -> dict[str, Tensor]:
        """What clients need beside the weights so as not to forget."""
        beside: dict[str, Tensor] = {}
        if self.replay == "clients" and self.rehearsal.needs_previous:
            beside |= {PREVIOUS + name: tensor for name, tensor in self.previous.items()}
        if self.replay == "clients" and self.rehearsal.needs_memory and len(self.bank):
            beside |= {MEMORY + name: tensor for name, tensor in self._memory()._asdict().items()}
        return beside

    def _source(self, step: int, round: int) -> Source:
        return Source(f"global model after task {step + 1}", self.name, round, self.federation.seed)

    def _memory(self) -> Memory:
        """The bank, on the CPU."""
        return Memory(self.bank.pixels.cpu(), self.bank.labels.cpu())

    def _mine(self, model: nn.Module, step: int, round: int) -> None:
        """Mine what the model knows, or what it has just learnt, into the bank."""
        assert self.method is not None
        fed, task, method = self.federation, self.course.tasks[step], self.method
        teacher, generator = in_every_turn(model), seeds.generator(fed.seed, f"server/{self.name}", round)
        source = self._source(step, round)
        synthesizer, held = copy.deepcopy(method.synthesizer), Bank(method.mining.images)  # what one was told of other classes is of no use
        if isinstance(synthesizer, NoisyLayerGenerator):  # it may know the classes by their names
            synthesizer.of(self.course.order[: len(task.seen)], 1 if teacher is model else QUARTERS)

        def progress(stage: str, done: int, total: int, **info: object) -> None:
            fed.watch.progress(f"{stage} {self.name}", done, total, **info)

        with compiled(fed.compile):
            if self.student:
                mine_and_distil(
                    teacher, in_every_turn(placed(fed.build(None, len(task.seen)), fed.device)), synthesizer, mining=method.mining,
                    distillation=self.distillation, bank=held, source=source, shape=fed.shape, generator=generator, progress=progress,
                    saves=Part(fed.keep, round, f"impressions by {self.name}"),
                )  # fmt: skip
            else:
                mine(
                    teacher,
                    synthesizer,
                    mining=method.mining,
                    bank=held,
                    source=source,
                    shape=fed.shape,
                    generator=generator,
                    progress=progress,
                )
        # Remembered as what the model takes them for: of data impressions in every turn, one in five shows what it was asked for.
        found = Impressions(held.images, held.targets, held.targets.argmax(1), 0, "; ".join(held.notes))
        if teacher is not model:
            found = turned_back(found)
        if self.mines == "new":
            brought = torch.tensor(self.course.brought(step), device=found.labels.device)
            share = max(1, self.bank.capacity // (self.bank.groups + len(brought)))
            self.bank.thin(share)
            places = (torch.isin(found.labels, brought) & (place_in_group(found.labels) < share)).nonzero().flatten()
            found = replace(found, images=found.images[places], targets=found.targets[places], labels=found.labels[places])
        self.bank.add(found, source)
        absent = sorted(set(task.seen) - set(self.bank.labels.tolist()))
        if absent and self.replay == "server":
            names = ", ".join(self.course.data.train.classes[k] for k in absent)
            remedy = f"Raise synthesis.{self.name}.mining.images ({method.mining.images}) or its capacity ({self.bank.capacity})."
            raise FedimprError(f"the server has no impression of class {names}", stage=f"round {round}, mining {self.name}", remedy=remedy)
        fed.watch.mined(round, self.name, self.bank, model)

    def _consolidate(self, model: nn.Module, step: int, round: int) -> None:
        """The server learns as a client would: impressions of what the task brought are its images, the others its memory."""
        assert self.consolidation is not None
        fed, (pixels, labels) = self.federation, self._memory()
        new = self.bank.came_from(self._source(step, round)).cpu()
        own = Images(pixels[new], labels[new], self.course.data.train.classes)
        previous = placed(loaded(fed.build(None, self.course.classes(step - 1)), self.previous), fed.device)
        lesson = self.rehearsal.bound(
            torch.tensor(self.course.brought(step)), previous, Memory(pixels[~new], labels[~new]), fed.seed, self.course.order
        )
        self.consolidation(model, own, seeds.generator(fed.seed, "consolidation", round), lesson)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No client evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing to aggregate."""

    def summary(self) -> None:
        """Nothing to log: the watch is told everything."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round needs beside the global weights: the model of the step before, the bank, and what the rounds have cost."""
        state = self.ledger.state_dict() | {PREVIOUS + name: tensor for name, tensor in self.previous.items()}
        return state | {f"bank/{key}": value for key, value in self.bank.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.ledger.load_state_dict(state)
        self.previous = under(state, PREVIOUS)
        self.bank.load_state_dict({key: value.to(self.federation.device) for key, value in under(state, "bank/").items()})


def turned_back(found: Impressions) -> Impressions:
    """Impressions of classes in every turn as upright ones of the classes."""
    images, probabilities = turned(found.images, -found.labels), found.targets.view(len(found), -1, QUARTERS).sum(2)
    return replace(found, images=images, targets=probabilities, labels=found.labels // QUARTERS)
