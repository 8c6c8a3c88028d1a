"""The client's app: says which place its node has, and trains the partitions there. The same in process and in a deployment."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedimpr import seeds
from fedimpr.devices import placed
from fedimpr.training import LocalTraining, cross_entropy
from fedimpr.update import Update, weights_of
from sim import adapting
from sim._flwr import CLIENT_APP_RAISED
from sim.client_states import kept_in, record_of
from sim.config import Settings, construct, from_json
from sim.federation import build_model, device_of, reference_of, threads, warm_model
from sim.grid import reason
from sim.lessons import turn_of
from strategies.federation import alike
from strategies.records import Instruction, answer_to_record
from strategies.tensors import to_arrays

app = ClientApp()
settings_of = functools.lru_cache(maxsize=1)(from_json)  # every client of a round is sent the same text


@app.query()
def who(message: Message, context: Context) -> Message:
    """The place of this node: Flower calls it the partition-id, and it is one where a node hosts one partition."""
    return Message(RecordDict({"who": ConfigRecord({"partition-id": int(context.node_config["partition-id"])})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The updates of those partitions of this node that take part, or their sum; an error reply where there is nothing to begin with.

    Where the run config says ``debug``, whatever goes wrong is raised.
    """
    debug = bool(context.run_config.get("debug"))
    try:
        asked = Instruction.from_record(message.content)
        settings, reasons = settings_of(asked.settings), dict[int, str]()
        partitions = hosted(settings, int(context.node_config["partition-id"]), asked.cohort)
        updates = train_partitions(settings, partitions, asked, reasons, context.state, debug=debug)
        return Message(answer_to_record(updates, reasons, sums=asked.sums), reply_to=message)
    except Exception as error:
        if debug:
            raise
        return Message(Error(CLIENT_APP_RAISED, reason(error)), reply_to=message)


def hosted(settings: Settings, place: int, cohort: Iterable[int]) -> list[int]:
    """The partitions of a cohort that the node at a place hosts."""
    return [partition for partition in cohort if partition // settings.clients_per_node == place]


def train_partitions(
    settings: Settings, partitions: Iterable[int], asked: Instruction, reasons: dict[int, str], state: RecordDict, *, debug: bool = False
) -> Iterator[Update]:
    """Train one partition after another; why one cannot be trained, or its update cannot be used in a sum, goes to ``reasons``.

    What their training keeps is found in ``state``, and left there. With ``debug`` it is raised, with a note on client, round and stage.
    """
    for partition in partitions:
        try:
            if asked.work:
                update = adapting.turn(settings, partition, asked)
            else:
                kept = kept_in(state, partition)
                update = train_partition(settings, partition, asked, kept)
                if kept:
                    state[record_of(partition)] = to_arrays(kept)
            if asked.sums:
                update.check(asked.weights)
            yield update
        except Exception as error:
            if debug:
                error.add_note(f"client {partition}, round {asked.round}, local training")
                raise
            reasons[partition] = reason(error)


def train_partition(settings: Settings, partition: int, asked: Instruction, kept: dict[str, Tensor] | None = None) -> Update:
    """Train a partition's model from the weights received, or from the seed's where its architecture is its own.

    What its training keeps from turn to turn comes in ``kept``, and is replaced there by what it keeps now.
    The number of threads is the settings': then clients give the same weights one after another as side by side.
    """
    start = time.perf_counter()
    with threads(settings.client_threads):
        data, classes, lesson = turn_of(settings, partition, asked)
        if alike(reference_of(settings, partition, classes), asked.weights):
            model = warm_model(settings, partition, asked.weights, classes)
        else:
            model = placed(build_model(settings, partition, classes), device_of(settings))
        training, generator = _training(json.dumps(settings.training)), seeds.generator(settings.seed, "training", asked.round, partition)
        # A training of a user's own need not know of what it is not asked for.
        more: dict[str, Any] = {} if lesson is cross_entropy else {"lesson": lesson}
        if getattr(training, "momentum_kept", False):
            more["momentum"] = kept
        metrics = training(model, data, generator, **more)
    return Update(
        partition=partition,
        round=asked.round,
        weights=weights_of(model),
        examples=len(data),
        metrics={**metrics, "seconds": time.perf_counter() - start},
        label_counts=torch.bincount(data.labels, minlength=int(settings.dataset["classes"])) if settings.send_label_counts else None,
    )


@functools.lru_cache(maxsize=1)
def _training(text: str) -> LocalTraining:
    """Local training, built once per process: it keeps nothing from one client to the next."""
    training: LocalTraining = construct(json.loads(text), "training")
    return training
