"""Configurations are checked before anything starts: one line that names the key, the value and what is allowed."""

from __future__ import annotations

import re

import pytest
from hydra.errors import HydraException

from fedimpr.data.partition import Shards
from fedimpr.errors import FedimprError
from fedimpr.views import Views
from sim.config import CONFIGS, call, composed, construct, from_json, in_one_line, placed
from sim.federation import build_model, check

WRONG = {
    "partition.alpha=0": r"'partition.alpha' is 0.*; allowed: .*> 0",
    "partition.alpha=x": r"'partition.alpha' is 'x'; allowed: a number$",
    "clients=0": r"'clients' is 0; allowed: an integer >= 1",
    "clients=2.5": r"'clients' is 2.5; allowed: an integer$",
    "clients=5000": r"clients.*5000",
    "rounds=two": r"'rounds' is 'two'; allowed: an integer$",
    "device=tpu": r"'device' is 'tpu'; allowed: 'auto' or 'cpu' or 'cuda'",
    "model.name=lenet": r"'model.name' is 'lenet'; allowed: one of lenet5",
    "training.lr=-1": r"'training.lr' is -1.0; allowed: a number > 0",
    "training.views.scale=[1]": r"'training.views.scale' is \[1\]; allowed: a list of 2: a number, a number",
    "training._target_=fedimpr.nothing": r"'training._target_' is 'fedimpr.nothing'; allowed: the dotted name",
    "synthesis.di.synthesizer.variant=released": r"'synthesis.di.synthesizer.variant' is 'released'; allowed: 'text' or 'as_released'",
    "synthesis.di.mining.images=0": r"'synthesis.di.mining.images' is 0; allowed: an integer >= before \+ portions",
    "dataset.source=ftp": r"'dataset.source' is 'ftp'",
    "strategy.minimum_updates=11": r"'strategy.minimum_updates' is 11; allowed: null or an integer in \[1, 10\], the clients of a round",
    "send_label_counts=1": r"'send_label_counts' is 1; allowed: true or false",
    "tracking=[wandb]": r"'tracking\[0\]' is 'wandb'; allowed: 'tensorboard' or 'mlflow'",
    "tracking=mlflow": r"'tracking' is 'mlflow'; allowed: a list, each 'tensorboard' or 'mlflow'",
    "deadline=30": r"'deadline' is 30.0; allowed: null without devices: a virtual clock needs some, e.g. devices=phones",
    "devices=phones deadline=0": r"'deadline' is 0.0; allowed: null or a number > 0",
    "devices=phones devices.kinds.nexus_6.dropout=2": r"'devices.kinds.nexus_6.dropout' is 2.0; allowed: a number in \[0, 1\)",
    "devices=phones +devices.kinds.nexus_6.wifi=2": r"'devices.kinds.nexus_6.wifi' is 2; allowed: one of source, share, ",
    "devices=phones devices.kinds.nexus_6=fast": r"'devices.kinds.nexus_6' is 'fast'; allowed: a mapping",
    "devices=phones devices.training_jitter=-1": r"'devices.training_jitter' is -1.0; allowed: a number >= 0",
    "+devices.kinds=[]": r"'devices.kinds' is \[\]; allowed: a mapping of one kind or more",
    "strategy=fedbuff": r"'devices.kinds' is None; allowed: those of a profile, e.g. devices=phones",
    "strategy=fedbuff devices=phones strategy.buffer=11": r"'strategy.buffer' is 11; allowed: an integer in \[1, 10\]",
    "strategy=fedbuff devices=phones strategy.staleness=linear": r"'strategy.staleness' is 'linear'; allowed: 'square_root' or 'constant'",
    "strategy=fedavg strategy.partial_sums=true evaluate_clients=false devices=phones": r"'strategy.partial_sums' is True; allowed: false",
    "client_models=[]": r"'client_models' is \[\]; allowed: null, or a list of one model or more",
    "client_models=[{name:lenet5}]": r"'client_models\[0\].options' is None; allowed: a value; it is missing",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_one_line(override: str) -> None:
    with pytest.raises(FedimprError, match=WRONG[override]) as caught:
        check(composed(override.split()))
    assert "\n" not in str(caught.value)


def test_a_missing_data_folder_is_one_line(tmp_path) -> None:
    with pytest.raises(FedimprError, match=r"dataset.folder.*nowhere") as caught:
        check(composed(["dataset=mnist", f"dataset.folder='{tmp_path / 'nowhere'}'"]))
    assert "\n" not in str(caught.value)


UNKNOWN = {
    "clinets=3": r"'clinets' is '3'; allowed: a key of the configuration; did you mean clients",
    "partition.beta=3": r"'partition.beta' is '3'; allowed: a key",
    "experiment=demmo": r"'experiment' is 'demmo'; allowed: one of .*demo",
    "synthesis=[dii]": r"'synthesis' is 'dii'; allowed: one of ci, cmi, .*di",
    "model=lenet": r"'model' is 'lenet'; allowed: one of .*lenet5",
    "devices=phone": r"'devices' is 'phone'; allowed: one of boards, none, phones, uniform",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_what_hydra_says_in_many_lines_becomes_one(override: str) -> None:
    with pytest.raises(HydraException) as caught:
        composed([override])
    text = in_one_line(caught.value, [override], "config")
    assert "\n" not in text and re.search(UNKNOWN[override], text)


def test_an_unknown_key_below_a_target_is_named_with_its_neighbour() -> None:
    with pytest.raises(FedimprError, match=r"'training.epoch' is 3; allowed: one of .*did you mean epochs\?"):
        check(composed(["+training.epoch=3"]))


def test_a_missing_key_is_named() -> None:
    node = {"_target_": "fedimpr.views.Views", "shift": 0.0, "rotation": 0.0, "flip": False}
    with pytest.raises(FedimprError, match=r"'views.scale' is None; allowed: a value \(a list of 2: a number, a number\); it is missing"):
        construct(node, "views")
    assert construct({**node, "scale": [1, 1]}, "views") == Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)


def test_types_are_those_of_the_signature() -> None:
    def callee(*, a: int | None, b: tuple[float, ...], c: str) -> tuple:
        return a, b, c

    assert call(callee, {"a": None, "b": [1, 2], "c": "x"}, "") == (None, (1.0, 2.0), "x")
    for wrong in ({"a": "1", "b": [], "c": "x"}, {"a": True, "b": [], "c": "x"}, {"a": 1, "b": ["x"], "c": "x"}, {"a": 1, "b": [], "c": 3}):
        with pytest.raises(FedimprError):
            call(callee, wrong, "")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_experiment_composes_and_goes_to_json_and_back(name: str) -> None:
    settings = composed([f"experiment={name}"])
    again = from_json(settings.to_json())
    assert again == settings and again.hash() == settings.hash() and list(again.synthesis) == list(settings.synthesis)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_an_experiment_is_run_with_another_network_and_partition_by_naming_them(name: str) -> None:
    """What an experiment sets of its own is not passed to another one."""
    settings = composed([f"experiment={name}", "model=torchvision_resnet18", "partition=shards"])
    assert type(build_model(settings, None).network).__name__ == "ResNet"
    assert construct(settings.partition, "partition") == Shards(per_client=2)


CHOICES: dict[str, list[str]] = {}
for path in sorted(CONFIGS.glob("*/*.yaml")):
    if path.parent.name not in ("experiment", "study", "continual"):
        CHOICES.setdefault(path.parent.name, []).append(path.stem)


@pytest.mark.parametrize("place", range(max(map(len, CHOICES.values()))))
def test_every_choice_of_every_group_composes(place: int) -> None:
    """The first choices of all groups, the second ones, and so on; a group with fewer begins again."""
    chosen = {group: choices[place % len(choices)] for group, choices in CHOICES.items()}
    if (chosen["strategy"] == "continual") != (chosen["tasks"] != "none"):  # neither goes without the other
        chosen["tasks"] = "none" if chosen["strategy"] != "continual" else "class_incremental"
    composed([f"{group}={choice}" for group, choice in chosen.items()])


@pytest.mark.parametrize("tasks", [choice for choice in CHOICES["tasks"] if choice != "none"])
@pytest.mark.parametrize("row", sorted(path.stem for path in (CONFIGS / "continual").glob("*.yaml")))
def test_every_way_to_go_on_composes_with_every_way_to_cut_tasks(row: str, tasks: str) -> None:
    composed([f"tasks={tasks}", f"continual={row}"])


def test_the_hash_knows_what_decides_a_result() -> None:
    one = composed(["output=/a"])
    assert one.hash() == composed(["output=/b", "runtime=flower"]).hash()
    assert one.hash() != composed(["output=/a", "seed=1"]).hash()
    assert (
        len({one.hash(), *(composed(["output=/a", *more]).hash() for more in (["devices=phones"], ["devices=phones", "deadline=3"]))}) == 3
    )
    assert one.hash() != composed(["output=/a", "synthesis=[cmi,di]"]).hash()  # the first method's student is the global model


def test_an_experiment_that_tunes_a_method_runs_without_it() -> None:
    assert list(composed(["experiment=demo", "synthesis=[di]"]).synthesis) == ["di"]


def test_no_run_is_written_over(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    for _ in range(3):  # within one second, as the points of a sweep may be
        taken.append(placed(composed(["experiment=demo"])).folder)
        taken[-1].mkdir(parents=True)
    assert len(set(taken)) == 3 and all(folder.parent == tmp_path / "results" / "demo" for folder in taken)
    (taken[0] / "run.json").write_text("{}")
    with pytest.raises(FedimprError, match="'output' is .*; allowed: a folder without a run"):
        placed(composed([f"output='{taken[0]}'"]))
    assert placed(composed([f"resume='{taken[0]}'"])).folder == taken[0]
