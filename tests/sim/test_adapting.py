"""Domain adaptation across clients, from settings to weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedimpr.adaptation import reestimate
from fedimpr.ensemble import Ensemble
from fedimpr.errors import FedimprError
from sim.adapting import evaluation_of
from sim.config import composed, construct
from sim.federation import check, dataset_of, shard_of
from sim.local import run_local
from sim.results import read_metrics
from sim.weights import weights_hash
from strategies.records import Instruction
from tests.sim.adapting_tiny import WAYS, adapting, adapting_overrides
from tests.sim.power import Stopped, stopping
from tests.sim.tiny import assert_same, weights


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all methods."""
    folder = tmp_path_factory.mktemp("straight")
    run_local(adapting(folder))
    return folder


def lines(folder: Path, stage: str) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["stage"] == stage]


def table(folder: Path) -> dict[str, dict]:
    return {row["method"]: row for row in json.loads((folder / "summary.json").read_text())}


# The table


def test_a_table_has_every_row(straight: Path) -> None:
    needing = ("cdan", "coral", "dann", "label_spreading", "mmd", "self_training")
    adapted = {f"adapted by {way}{' with DI' if way in needing else ''}" for way in WAYS}
    beside = {"best single source (by the test set)", "mean single source", "uniform ensemble", "ensemble by usefulness"}
    beside |= {"ensemble with target batch norm", "start of the adaptation", "FedAvg of the sources"}
    beside |= {"uniform ensemble of probabilities", "ensemble of probabilities by usefulness"}
    assert table(straight).keys() == adapted | beside
    rows = table(straight)
    single = [line["test_accuracy"] for line in lines(straight, "source")]
    assert rows["best single source (by the test set)"]["accuracy"] == max(single) and len(single) == 2
    assert rows["mean single source"]["accuracy"] == sum(single) / 2
    assert sum(line["usefulness"] for line in lines(straight, "source")) == pytest.approx(1)


def test_models_are_evaluated_on_test_images_of_the_targets_domains_alone(tmp_path: Path) -> None:
    settings = adapting(tmp_path)
    test, parts = evaluation_of(settings)
    everything = dataset_of(settings).test
    assert everything.domains is not None and test.domains is not None
    assert test.domains.unique().tolist() == [1] and len(test) == int((everything.domains == 1).sum()) and parts.keys() == {"negative"}


def test_the_ensembles_statistics_are_those_of_the_targets_images(straight: Path, tmp_path: Path) -> None:
    """Its members are the source models; re-estimated on the target's images they are the same."""
    settings = adapting(tmp_path)
    uniform, moved = (Ensemble.load(straight / f"{name}.safetensors") for name in ("uniform-ensemble", "ensemble-with-target-batch-norm"))
    pixels = shard_of(settings, 1).pixels
    for before, after in zip(uniform.members, moved.members, strict=True):
        reestimate(before, (part.float() / 255 for part in pixels.split(64)), momentum=None)
        for name, tensor in after.state_dict().items():
            torch.testing.assert_close(before.state_dict()[name], tensor)


def test_several_rounds_of_the_sources_are_federated_averaging(tmp_path: Path) -> None:
    run_local(adapting(tmp_path, "strategy.source_rounds=2", "rounds=4", "strategy.start=merged", ways=("shot",)))
    clients = [(line["round"], line["client"]) for line in lines(tmp_path, "client")]
    assert clients == [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1)]  # the survey trains nothing
    assert "start of the adaptation" in table(tmp_path)


# What nobody may see


def test_labels_of_a_target_change_nothing_but_the_oracle(straight: Path, tmp_path: Path) -> None:
    run_local(adapting(tmp_path, "+faults.1._target_=fedimpr.data.faults.PermutedLabels"))
    one, two = weights(straight), weights(tmp_path)
    differing = {name.split("/")[0] for name in one if not torch.equal(one[name], two[name])}
    assert one.keys() == two.keys() and differing == {"adapted-by-oracle"}


def test_only_what_a_method_needs_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, set[str]] = {}
    written = Instruction.to_record

    def watched(self: Instruction):
        sent[self.work] = {name.split("/")[0] for name in self.beside}
        return written(self)

    monkeypatch.setattr(Instruction, "to_record", watched)
    run_local(adapting(tmp_path, ways=("coral", "kd3a", "shot")))
    assert sent == {"": set(), "survey": {"sources"}, "coral": {"weights", "impressions"}, "kd3a": {"weights", "sources"}, "shot": set()}


# Who takes part, and when


def test_a_target_may_join_later(tmp_path: Path) -> None:
    more = ("clients=4", "strategy.targets=[1,3]", "+strategy.joins.3=4", "rounds=4")
    run_local(adapting(tmp_path, *more, ways=("shot",)))
    assert [(line["round"], line["client"]) for line in lines(tmp_path, "client")] == [(1, 0), (1, 2), (3, 1), (4, 1), (4, 3)]


def test_targets_of_two_domains_are_evaluated_together_and_each(tmp_path: Path) -> None:
    run_local(adapting(tmp_path, "strategy.targets=[negative,mixed]", ways=("shot",)))
    last = lines(tmp_path, "candidate")[-1]
    sizes = {name: len(part) for name, part in evaluation_of(adapting(tmp_path))[1].items()}
    assert last["method"] == "adapted by shot" and {"test_accuracy_negative", "test_accuracy_mixed"} <= last.keys() and sizes
    both = evaluation_of(adapting(tmp_path, "strategy.targets=[negative,mixed]", ways=("shot",)))[1]
    hits = sum(last[f"test_accuracy_{name}"] * len(part) for name, part in both.items())
    assert last["test_accuracy"] == pytest.approx(hits / sum(map(len, both.values())))


def test_a_source_with_another_order_of_its_labels_has_no_weight_beside_two_that_agree(tmp_path: Path) -> None:
    """Three clients with the same kind of images, well trained, and a fourth that calls each digit the next one."""
    more = ["clients=5", "partition=iid", "strategy.targets=[4]", "training.epochs=6", "training.batch_size=16", "training.lr=0.05"]
    spoiled = "+faults.1._target_=fedimpr.data.faults.PermutedLabels"
    run_local(adapting(tmp_path, *more, "dataset.source=embedded", spoiled, ways=("shot",)))
    useful = {line["client"]: line["usefulness"] for line in lines(tmp_path, "source")}
    assert useful[1] < 0.02 and min(useful[client] for client in (0, 2, 3)) > 0.2


# Interrupted


# Of the first round: its end. Of the survey: the updates, the impressions of two sources, its end. Of the third: its end.
@pytest.mark.parametrize("savings", [1, 2, 3, 5])
def test_stopped_anywhere_it_goes_on_to_the_same_weights(straight: Path, tmp_path: Path, savings: int) -> None:
    with stopping(savings), pytest.raises(Stopped):
        run_local(adapting(tmp_path))
    run_local(adapting(tmp_path, resume=tmp_path))
    assert_same(straight, tmp_path)
    assert table(straight).keys() == table(tmp_path).keys()


# Bad input

WRONG = {
    "rounds=2": r"'rounds' is 2; allowed: 3 or more: strategy.source_rounds, one to survey,",
    "strategy.sources=[negative]": r"'strategy.sources' is .*; allowed: clients that are no targets, and client 1 is one",
    "strategy.targets=[desert]": r"'strategy.targets' is 'desert'; allowed: a domain that has clients of its own \(plain, neg",
    "strategy.targets=[plain,negative,mixed]": r"allowed: not all of the 3 clients",
    "+strategy.joins={negative:3}": r"'strategy.joins' is .*; allowed: one target at least in round 2, the survey",
    "model.options.batch_norm=false": r"'model' is 'Classifier'; allowed: one with batch norm: .* \(for adaptation=batch_norm\)",
    "adaptation=[]": r"'adaptation' is 'nothing'; allowed: one method or more",
    "devices=phones": r"'devices.kinds' is 'some'; allowed: devices=none",
    "strategy.survey_batch=1": r"'strategy.survey_batch' is 1; allowed: an integer >= 2",
    "+faults.9._target_=fedimpr.data.faults.PermutedLabels": r"'faults' is '?9'?; allowed: a client's number in \[0, 3\)",
    "adaptation.shot.method.pseudo=-1": r"'adaptation.shot.method.pseudo' is -1.0; allowed: a number >= 0",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_setting_is_one_line(override: str, tmp_path: Path) -> None:
    ways = () if override == "adaptation=[]" else ("batch_norm", "shot")
    with pytest.raises(FedimprError, match=WRONG[override]) as caught:
        check(composed(adapting_overrides(*([] if not ways else [override]), ways=ways)))
    assert "\n" not in str(caught.value)


def test_impressions_are_wanted_and_nobody_mines_them() -> None:
    settings = replace(composed(adapting_overrides(ways=("coral",))), synthesis={})
    with pytest.raises(FedimprError, match=r"'synthesis' is 'nothing'; allowed: one method or more.*adaptation=coral learns from"):
        check(settings)


@pytest.mark.parametrize(
    "fault",
    [
        ("+faults.1._target_=fedimpr.data.faults.OnlySome", "+faults.1.images=10"),  # a target with ten images
        ("+faults.1._target_=fedimpr.data.faults.OnlyClasses", "+faults.1.classes=[0,1,2]"),  # with a subset of the classes
        ("+faults.0._target_=fedimpr.data.faults.OnlyClasses", "+faults.0.classes=[0,1,2,3,4]"),  # nine tells only source 2,
        ("+faults.0._target_=fedimpr.data.faults.OnlyClasses", "+faults.0.classes=[0,1]", "clients=2", "strategy.targets=[1]"),  # or nobody
    ],
    ids=["ten images", "a target with three classes", "a label that one source lacks", "a class that no source has"],
)
def test_odd_clients_are_adapted_as_well(fault: tuple[str, ...], tmp_path: Path) -> None:
    run_local(adapting(tmp_path, *fault, ways=("coral", "kd3a", "shot")))
    assert all(bool(tensor.isfinite().all()) for name, tensor in weights(tmp_path).items() if name.startswith("adapted"))


def test_models_without_batch_norm_have_no_row_for_it(tmp_path: Path) -> None:
    run_local(adapting(tmp_path, "model.options.batch_norm=false", ways=("kd3a", "self_training")))
    assert "ensemble with target batch norm" not in table(tmp_path) and "adapted by kd3a" in table(tmp_path)
    voices = Ensemble.load(tmp_path / "ensemble-of-probabilities-by-usefulness.safetensors")
    assert len(voices) == 2  # the sources, once


def test_the_ensemble_of_probabilities_has_each_source_as_it_is_and_with_the_targets_statistics(straight: Path) -> None:
    useful, moved, both = (
        Ensemble.load(straight / f"{name}.safetensors")
        for name in ("ensemble-by-usefulness", "ensemble-with-target-batch-norm", "ensemble-of-probabilities-by-usefulness")
    )
    assert both.mean == "probabilities" and torch.equal(both.weights, useful.weights.repeat(2, 1) / 2)
    for member, source in zip(both.members, [*useful.members, *moved.members], strict=True):
        assert weights_hash(member.state_dict()) == weights_hash(source.state_dict())


# Settings that ship


@pytest.mark.parametrize("way", WAYS)
def test_a_yaml_holds_every_setting_and_no_default_stands_in_code(way: str) -> None:
    node = composed([f"adaptation=[{way}]"]).adaptation[way]
    for place in (node, node.get("method", {})):
        for key in list(place):
            value = place.pop(key)
            with pytest.raises(FedimprError, match=key):
                construct(node, way)
            place[key] = value
    construct(node, way)
