"""What the metrics say of traffic is what the messages held."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict
from torch import nn

from fedimpr.update import Update
from sim import client_app, server_app
from sim.config import Settings
from sim.federation import build_model, warm_model
from sim.grid import LocalGrid
from sim.local import run_local
from sim.results import read_metrics
from strategies.records import Instruction
from tests.sim.tiny import tiny

# LeNet-5 for 8x8 pixels, which a padded convolution and a pool make 4x4 and then 2x2: kernels or units times inputs and a bias.
WEIGHTS = 6 * (25 + 1) + 16 * (6 * 25 + 1) + 120 * (16 * 2 * 2 + 1) + 84 * (120 + 1) + 10 * (84 + 1)


def held(content: RecordDict) -> int:
    """The bytes of a message's tensors, each written out, and of its label counts at eight bytes each."""
    arrays = sum(array.numpy().nbytes for record in content.array_records.values() for array in record.values())
    return arrays + sum(8 * len(record["counts"]) for name, record in content.metric_records.items() if name.startswith("label-counts"))


class Scales(LocalGrid):
    """Weighs what goes down and up in each round."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(client_app.app, settings.nodes, {})
        self.down, self.up = defaultdict[str, int](int), defaultdict[str, int](int)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            self.down[message.metadata.group_id] += held(message.content)
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        for reply in replies:
            self.up[reply.metadata.group_id] += 0 if reply.has_error() else held(reply.content)
        return replies


def lines(folder: Path, stage: str) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["stage"] == stage]


def test_a_client_is_sent_the_weights_and_sends_them(tmp_path: Path) -> None:
    """Four bytes a weight; without devices nobody knows of time."""
    run_local(tiny(tmp_path, "strategy=fedavg", "model.options.batch_norm=false", methods=["di"]))
    for line in lines(tmp_path, "client"):
        assert line["bytes_down"] == line["bytes_up"] == 4 * WEIGHTS and "device" not in line and "simulated_seconds" not in line
    (line,) = lines(tmp_path, "round")
    assert (line["clients"], line["bytes_down"], line["bytes_up"]) == (3, 12 * WEIGHTS, 12 * WEIGHTS) and "simulated_seconds" not in line


CASES = [
    ("strategy=fedavg",),
    ("strategy=fedavg", "clients=5", "clients_per_node=2", "cohort=4"),
    ("strategy=fedavg", "clients=5", "clients_per_node=2", "strategy.partial_sums=true", "evaluate_clients=false"),
    ("strategy=fedavg", "send_label_counts=true", "strategy.partial_sums=true", "evaluate_clients=false", "clients_per_node=2"),
    ("strategy=data_free", "send_label_counts=true"),
    ("strategy=data_free", "client_models=[{name:lenet5,options:{batch_norm:true}},{name:lenet5_half,options:{batch_norm:true}}]"),
]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_metrics_weigh_what_was_sent(tmp_path: Path, case: tuple[str, ...]) -> None:
    rounds = 1 if "client_models" in case[-1] else 2
    settings = tiny(tmp_path, *case, f"rounds={rounds}", methods=["di"])
    grid = Scales(settings)
    server_app.run(settings, grid)
    clients = lines(tmp_path, "client")
    for line in lines(tmp_path, "round"):
        mine, group = [one for one in clients if one["round"] == line["round"]], str(line["round"])
        assert line["bytes_down"] == sum(one["bytes_down"] for one in mine) == grid.down[group] > 0
        assert line["bytes_up"] == sum(one["bytes_up"] for one in mine) == grid.up[group] > 0
    last = json.loads((tmp_path / "summary.json").read_text())[-1]
    assert (last["bytes_down"], last["bytes_up"]) == (sum(grid.down.values()), sum(grid.up.values())) and last["simulated_seconds"] is None
    assert "to clients (MB)" in (tmp_path / "report.html").read_text()


def test_what_was_refused_was_sent_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four clients one sends what is not finite, and one fails and sends nothing."""
    train = client_app.train_partition

    def misbehaving(settings: Settings, partition: int, *rest: object) -> Update:
        update = train(settings, partition, *rest)  # type: ignore[arg-type]
        if partition == 1:
            next(iter(update.weights.values())).view(-1)[0] = math.nan
        if partition == 2:
            raise OSError("the disk is full")
        return update

    monkeypatch.setattr(client_app, "train_partition", misbehaving)
    settings = tiny(tmp_path, "strategy=fedavg", "clients=4", "strategy.minimum_updates=2", methods=["di"])
    grid = Scales(settings)
    server_app.run(settings, grid)
    (line,) = lines(tmp_path, "round")
    one = lines(tmp_path, "client")[0]["bytes_up"]
    assert (line["clients"], line["bytes_down"], line["bytes_up"]) == (2, 4 * one, 3 * one) == (2, grid.down["1"], grid.up["1"])


def test_clients_compute_channels_last_and_send_plain_weights(tmp_path: Path) -> None:
    """The first turn builds the model, the second finds it warm."""
    settings = tiny(tmp_path, "strategy=fedavg", methods=["di"])
    weights = build_model(settings, None).state_dict()
    for round in (1, 2):
        asked = Instruction(weights=weights, round=round, settings="", cohort=[], sums=False)
        sent = client_app.train_partition(settings, 0, asked).weights
        convolutions = [layer.weight for layer in warm_model(settings, 0, weights).modules() if isinstance(layer, nn.Conv2d)]
        assert convolutions and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
        assert sent.keys() == weights.keys() and all(tensor.is_contiguous() for tensor in sent.values())


@pytest.mark.parametrize("strategy", ["fedavg", "data_free"])
def test_totals_go_on_in_another_folder(tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped after its first round has the costs of a straight one, though the new folder has no metrics of that round."""
    asked = (f"strategy={strategy}", "rounds=3")
    run_local(tiny(tmp_path / "straight", *asked, methods=["di"]))
    train = client_app.train_partition

    def stops(settings: Settings, partition: int, asked: Instruction, *rest: object) -> Update:
        if asked.round == 2:
            raise KeyboardInterrupt
        return train(settings, partition, asked, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(client_app, "train_partition", stops)
        with pytest.raises(KeyboardInterrupt):
            run_local(tiny(tmp_path / "stopped", *asked, methods=["di"]))
    run_local(tiny(tmp_path / "new", *asked, f"resume='{tmp_path / 'stopped'}'", methods=["di"]))
    rows = [json.loads((tmp_path / name / "summary.json").read_text())[-1] for name in ("straight", "new")]
    assert [(row["bytes_down"], row["bytes_up"]) for row in rows] == [(rows[0]["bytes_down"], rows[0]["bytes_up"])] * 2
    assert rows[0]["bytes_down"] == sum(line["bytes_down"] for line in lines(tmp_path / "straight", "round"))
