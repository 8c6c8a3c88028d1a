"""The client's app: says which partition it hosts, and trains on it. The same in process, in simulation and in a deployment."""

from __future__ import annotations

import functools
import json
import time

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedimpr import seeds
from fedimpr.training import LocalTraining
from fedimpr.update import Update
from sim._flwr import CLIENT_APP_RAISED
from sim.config import Settings, construct, from_json
from sim.federation import build_model, dataset_of, device_of, partition_of, threads, warm_model
from sim.grid import reason
from strategies.records import read_instruction, update_to_record

app = ClientApp()
settings_of = functools.lru_cache(maxsize=1)(from_json)  # every client of a round is sent the same text


@app.query()
def who(message: Message, context: Context) -> Message:
    """The partition that this node hosts."""
    return Message(RecordDict({"who": ConfigRecord({"partition-id": int(context.node_config["partition-id"])})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The update of this node's partition, or an error reply with the reason in one line."""
    try:
        weights, round, text = read_instruction(message.content)
        update = train_partition(settings_of(text), int(context.node_config["partition-id"]), round, weights)
        return Message(update_to_record(update), reply_to=message)
    except Exception as error:
        return Message(Error(CLIENT_APP_RAISED, reason(error)), reply_to=message)


def train_partition(settings: Settings, partition: int, round: int, weights: dict[str, Tensor] | None) -> Update:
    """Train a partition's model from the weights received, or from the seed's where its architecture is its own.

    One thread: then clients give the same weights one after another as side by side.
    """
    start = time.perf_counter()
    with threads(1):
        data = dataset_of(settings).train.subset(partition_of(settings).indices[partition])
        if weights is None:
            model = build_model(settings, partition)
        else:
            model = warm_model(settings, partition)
            model.load_state_dict(weights)
        model.to(device_of(settings))
        metrics = _training(json.dumps(settings.training))(model, data, seeds.generator(settings.seed, "training", round, partition))
    return Update(
        partition=partition,
        round=round,
        weights={name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()},
        examples=len(data),
        metrics={**metrics, "seconds": time.perf_counter() - start},
        label_counts=torch.bincount(data.labels, minlength=int(settings.dataset["classes"])) if settings.send_label_counts else None,
    )


@functools.lru_cache(maxsize=1)
def _training(text: str) -> LocalTraining:
    """Local training, built once per process: it keeps nothing from one client to the next."""
    training: LocalTraining = construct(json.loads(text), "training")
    return training
