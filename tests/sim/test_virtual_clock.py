"""Runs with devices: the same stragglers each time, left out before they train, and FedBuff as its paper has it."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedimpr.costs import training_cost
from fedimpr.errors import ConfigError, UpdateError
from fedimpr.states import size_of
from fedimpr.update import Update, average
from sim import client_app
from sim.checkpoint import States
from sim.config import CONFIGS, Settings
from sim.federation import build_model, fleet_of, partition_of
from sim.local import run_local
from sim.results import read_metrics
from strategies.records import Instruction
from strategies.schedule import steps
from tests.sim import tiny as small
from tests.sim.tiny import assert_same

PHONES = ("clients=6", "devices=phones", "strategy.minimum_updates=1")
# A turn takes from 0.08 s to 0.23 s here.
SYNCHRONOUS = ("strategy=fedavg", "rounds=3", *PHONES, "deadline=0.18")
BUFFERED = ("strategy=fedbuff", "rounds=4", "strategy.buffer=2", "cohort=4", *PHONES)
TIMES = {"time", "seconds"}


@functools.lru_cache  # composing takes longer than running
def base(*more: str) -> Settings:
    return small.tiny(Path("unused"), *more, methods=["di"])


def tiny(folder: Path, *more: str, resume: Path | None = None) -> Settings:
    return replace(base(*more), output=str(folder), resume=None if resume is None else str(resume))


def told(folder: Path, *stages: str) -> list[dict]:
    """What the metrics say of these stages, without real times."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["stage"] in (stages or ("client", "round", "excluded"))]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("asked", [SYNCHRONOUS, BUFFERED], ids=["synchronous", "buffered"])
def test_the_same_seed_has_the_same_stragglers_however_many_clients_a_node_hosts(tmp_path: Path, asked: tuple[str, ...]) -> None:
    run_local(tiny(tmp_path / "one", *asked))
    run_local(tiny(tmp_path / "two", *asked, "clients_per_node=3"))
    run_local(tiny(tmp_path / "other", *asked, "seed=1"))
    assert_same(tmp_path / "one", tmp_path / "two")
    assert told(tmp_path / "one") == told(tmp_path / "two")
    assert told(tmp_path / "one", "excluded") != told(tmp_path / "other", "excluded")


def test_who_is_late_or_drops_out_is_not_trained_and_its_download_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, trained = client_app.train_partition, list[tuple[int, int]]()

    def counting(settings: Settings, partition: int, asked: Instruction, *rest: object) -> Update:
        trained.append((asked.round, partition))
        return train(settings, partition, asked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(client_app, "train_partition", counting)
    settings = tiny(tmp_path, *SYNCHRONOUS)
    run_local(settings)
    clients, rounds, excluded = (told(tmp_path, stage) for stage in ("client", "round", "excluded"))
    assert trained == [(line["round"], line["client"]) for line in clients]
    assert any("is late" in line["reason"] for line in excluded) and not {(line["round"], line["client"]) for line in excluded} & set(
        trained
    )
    assert json.loads((tmp_path / "run.json").read_text())["excluded"] == [line["reason"] for line in excluded]
    fleet, size, clock = fleet_of(settings), size_of(build_model(settings, None).state_dict()), 0.0
    assert fleet is not None
    for line in rounds:
        there = [partition for partition in range(6) if fleet.there(line["round"], partition)]
        came = [one for one in clients if one["round"] == line["round"]]
        clock += max(fleet.turn(line["round"], partition).seconds for partition in there)
        assert (line["bytes_down"], line["bytes_up"], line["clients"]) == (size * len(there), size * len(came), len(came))
        assert line["simulated_seconds"] == pytest.approx(clock)
        for one in came:
            turn = fleet.turn(line["round"], one["client"])
            assert (one["device"], one["simulated_seconds"]) == (turn.device, turn.seconds)
    row = json.loads((tmp_path / "summary.json").read_text())[-1]
    assert row["simulated_seconds"] == pytest.approx(clock) and row["bytes_down"] == sum(line["bytes_down"] for line in rounds)
    assert "virtual clock (seconds)" in (tmp_path / "report.html").read_text()


def test_too_few_left_stop_the_run_before_anybody_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app, "train_partition", None)
    asked = ("strategy=fedavg", "devices=uniform", "deadline=1e-6")
    with pytest.raises(UpdateError, match="round 1, virtual clock: 0 updates can come of 3 clients .* Lower strategy.minimum_updates"):
        run_local(tiny(tmp_path, *asked))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "failed" and len(run["excluded"]) == 3


def test_one_shot_distillation_has_stragglers_too(tmp_path: Path) -> None:
    run_local(tiny(tmp_path, *PHONES, "deadline=0.18"))
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["method"] for row in rows][-1] == "student by DI" and 1 <= rows[-1]["clients"] < 6
    assert all(row["simulated_seconds"] == rows[0]["simulated_seconds"] > 0 for row in rows)


@pytest.mark.parametrize("asked", [SYNCHRONOUS, BUFFERED], ids=["synchronous", "buffered"])
def test_a_run_that_is_stopped_after_every_round_goes_on_on_the_same_clock(
    tmp_path: Path, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_local(tiny(tmp_path / "straight", *asked))
    write, folder, resume = States.after_round, tmp_path / "stopped", None

    def stops(self: States, round: int, *rest: object) -> None:
        write(self, round, *rest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(States, "after_round", stops)
        for _ in told(tmp_path / "straight", "round"):
            with pytest.raises(KeyboardInterrupt):
                run_local(tiny(folder, *asked, resume=resume))
            resume = folder
    run_local(tiny(folder, *asked, resume=resume))
    assert_same(tmp_path / "straight", folder)
    assert told(folder) == told(tmp_path / "straight")


@pytest.mark.parametrize("staleness", ["square_root", "constant"])
def test_fedbuff_is_algorithm_1_of_its_paper(tmp_path: Path, staleness: str) -> None:
    """w <- w + rate * mean of s(tau) * (what a client made of the weights it was sent - those weights), every client trained here anew."""
    settings = tiny(tmp_path, *BUFFERED, f"strategy.staleness={staleness}", "strategy.rate=0.5", "model.options.batch_norm=false")
    run_local(settings)
    fleet = fleet_of(settings)
    assert fleet is not None
    versions, ages = [build_model(settings, None).state_dict()], list[int]()
    for made, step in enumerate(itertools.islice(steps(fleet, concurrency=4, buffer=2, maximum_staleness=None), 4)):
        total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in versions[0].items()}
        for flight in step.arrived:
            sent, age = versions[flight.version], made - flight.version
            back = client_app.train_partition(settings, flight.partition, asked(made + 1, sent)).weights
            for name in total:
                total[name] += (back[name].double() - sent[name].double()) * (1 / math.sqrt(1 + age) if staleness == "square_root" else 1)
            ages.append(age)
        versions.append({name: (tensor.double() + 0.5 * total[name] / 2).float() for name, tensor in versions[-1].items()})
    torch.testing.assert_close(load_file(tmp_path / "fedbuff.safetensors"), versions[-1], rtol=1e-6, atol=1e-7)
    assert sorted(line["staleness"] for line in told(tmp_path, "client")) == sorted(ages) and max(ages) > 0


def asked(round: int, weights: dict[str, torch.Tensor]) -> Instruction:
    return Instruction(weights=weights, round=round, settings="", cohort=[], sums=False)


def test_fedbuff_that_waits_for_all_is_federated_averaging_with_uniform_weights(tmp_path: Path) -> None:
    settings = tiny(tmp_path, "strategy=fedbuff", "strategy.buffer=3", "devices=uniform", "rounds=2")
    run_local(settings)
    weights = build_model(settings, None).state_dict()
    for round in (1, 2):
        updates = [client_app.train_partition(settings, partition, asked(round, weights)) for partition in range(3)]
        weights = average(replace(update, examples=1) for update in updates)
    torch.testing.assert_close(load_file(tmp_path / "fedbuff.safetensors"), weights, rtol=1e-6, atol=1e-7)
    assert all(line["staleness"] == 0 for line in told(tmp_path, "client"))


def test_fedbuff_counts_traffic_when_it_happens(tmp_path: Path) -> None:
    """Downloads in the step in which they begin; uploads that are thrown away as well."""
    settings = tiny(tmp_path, *BUFFERED, "strategy.maximum_staleness=1")
    run_local(settings)
    fleet, size = fleet_of(settings), size_of(build_model(settings, None).state_dict())
    assert fleet is not None
    made = list(itertools.islice(steps(fleet, concurrency=4, buffer=2, maximum_staleness=1), 4))
    assert any("server steps old" in cause for step in made for _, cause in step.lost)
    for line, step in zip(told(tmp_path, "round"), made, strict=True):
        thrown = sum("server steps old" in cause for _, cause in step.lost)
        assert (line["bytes_down"], line["bytes_up"]) == (size * len(step.begun), size * (2 + thrown))
    assert told(tmp_path, "round")[-1]["simulated_seconds"] == pytest.approx(sum(step.seconds for step in made))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "devices").glob("*.yaml")))
def test_every_profile_makes_a_fleet(name: str) -> None:
    settings = tiny(Path("unused"), f"devices={name}", "clients=20")
    fleet = fleet_of(settings)
    assert (fleet is None) == (name == "none")
    for partition in range(20 if fleet else 0):
        assert fleet.able(partition) and fleet.devices[partition].source and fleet.turn(1, partition).seconds > 0  # type: ignore[union-attr]


def test_a_turns_load_follows_from_the_settings() -> None:
    settings = tiny(Path("unused"), "devices=uniform", "training.epochs=3", "send_label_counts=true")
    fleet, model = fleet_of(settings), build_model(settings, None)
    assert fleet is not None
    cost, size = training_cost(model, (1, 8, 8), 128), size_of(model.state_dict())
    for load, indices in zip(fleet.loads, partition_of(settings).indices, strict=True):
        assert load.macs == pytest.approx(3 * len(indices) * cost.macs) and load.memory == cost.memory
        assert (load.down, load.up) == (size, size + 10 * 8)


def test_unlike_models_have_unlike_loads() -> None:
    """The half LeNet is cheaper to train and to send; the global model is what all of them are sent."""
    models = "client_models=[{name:lenet5,options:{batch_norm:true}},{name:lenet5_half,options:{batch_norm:true}}]"
    fleet = fleet_of(tiny(Path("unused"), "devices=uniform", models, "clients=2", "partition=iid"))
    assert fleet is not None
    whole, half = fleet.loads
    assert half.macs < whole.macs and half.memory < whole.memory and half.up < whole.up and half.down == whole.down


def test_devices_without_the_memory_are_left_out_once_and_a_fleet_of_them_is_refused(tmp_path: Path) -> None:
    kind = "source:made up,share:1,macs_per_second:1e9,memory_mb:0.1,down_mbits:1,up_mbits:1,availability:1.0,dropout:0.0"
    run_local(tiny(tmp_path, "strategy=fedavg", "devices=uniform", f"+devices.kinds.small={{{kind}}}", "clients=4", "rounds=2"))
    assert [line["round"] for line in told(tmp_path, "excluded")] == [1, 1]
    assert [line["clients"] for line in told(tmp_path, "round")] == [2, 2]
    with pytest.raises(
        ConfigError, match="'devices.kinds' is 'memory_mb <= 0.1'; allowed: a kind with .* MB or more, which training takes"
    ):
        fleet_of(tiny(tmp_path, "devices=uniform", "devices.kinds.round.memory_mb=0.1"))
