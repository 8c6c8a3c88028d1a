"""A run from end to end in process: what it writes, and what happens when clients misbehave."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor, nn

from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, FedimprError, UpdateError
from fedimpr.evaluation import evaluate
from fedimpr.impressions import Bank, Impressions, Source
from fedimpr.models import rebuild
from fedimpr.update import Update
from sim import client_app, recorder, server_app
from sim.config import Settings, from_tree
from sim.federation import dataset_of
from sim.grid import LocalGrid
from sim.local import run_local
from strategies import Cost
from strategies.records import Instruction, answer_to_record
from tests.sim.tiny import assert_same, tiny

MEASURES = {"label_fidelity", "confidence", "mean_distance", "effective_number", "coverage", "frechet_distance"}


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_the_result_folder_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture, real_pictures: None) -> None:
    settings = tiny(tmp_path, methods=["cmi", "di"])
    run_local(settings)
    rows = read(tmp_path, "summary.json")
    assert [row["method"] for row in rows] == ["mean client", "one-shot FedAvg", "uniform ensemble", "student by CMI", "student by DI"]
    ceiling = rows[2]["accuracy"]
    for row in rows:
        assert (
            row["ratio"] == pytest.approx(row["accuracy"] / ceiling)
            and row["seconds"] >= 0
            and row["clients"] == 3
            and row["excluded"] == 0
        )
    for row in rows[3:]:
        assert row["transfer"].keys() == MEASURES and 0 <= row["transfer"]["label_fidelity"] <= 1
        assert 1 <= row["transfer"]["effective_number"] <= 24 + 1e-6
        assert row["images"] == 24 and row["steps"] == 4 and row["batch"] == 8
        assert 0 < row["mining_seconds"] < row["seconds"] and 0 < row["mining_passes"] < row["teacher_passes"]
    assert from_tree(yaml.safe_load((tmp_path / "config.yaml").read_text())) == settings
    manifest = read(tmp_path, "manifest.json")
    assert sum(manifest["sizes"]) == len(dataset_of(settings).train) and len(manifest["counts"]) == 3
    assert read(tmp_path, "run.json")["status"] == "finished" and read(tmp_path, "run.json")["config_hash"] == settings.hash()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"client", "candidate", "mined"} <= {line["stage"] for line in metrics}
    assert [{key: line[key] for key in MEASURES} for line in metrics if line["stage"] == "mined"] == [row["transfer"] for row in rows[3:]]
    for name in ("impressions.png", "partition.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 10_000
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()
    shown = capsys.readouterr().out
    assert "student by DI" in shown and str(tmp_path) in shown


class Pixels(nn.Module):
    """A teacher without a final layer: its logits are the first ten pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10]


def one_student(settings: Settings, note: str) -> dict:
    """The row of a student by a made-up method, whose teacher has no features."""
    bank = Bank(10)
    made = Impressions(torch.eye(10, 64).view(10, 1, 8, 8), torch.full((10, 10), 0.1), torch.arange(10), 0, note)
    bank.add(made, Source("pixels", "any", 1, 0))
    with recorder.Recorder(settings) as watch:
        watch.mined(1, "any", bank, Pixels())
        watch.candidate(1, "student by ANY", Pixels(), Cost(1.0, images=10))
        watch.candidate(1, "another", Pixels(), Cost(1.0))
    row, other = read(settings.folder, "summary.json")
    assert other["transfer"] is None and other["notes"] is None  # they belong to the student that learned from them
    return row


def test_a_teacher_without_a_final_layer_leaves_measures_out_and_notes_reach_the_report(tmp_path: Path) -> None:
    row = one_student(tiny(tmp_path, methods=["di"]), "3 of 10 are blank")
    # One pixel of ten is lit, that of the wanted class: its probability is e / (e + 9).
    assert row["transfer"] == pytest.approx({"label_fidelity": 1, "confidence": math.e / (math.e + 9)})
    assert row["notes"] == ["3 of 10 are blank"]
    assert "student by ANY: 3 of 10 are blank" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("no convergence"), FedimprError("too few")])
def test_a_measure_that_fails_does_not_stop_a_run(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(recorder, "describe", fails)
    assert one_student(tiny(tmp_path, methods=["di"]), "")["transfer"] is None
    assert f"round 1: the impressions of any are not measured: {error}" in caplog.text


def test_saved_models_score_what_the_table_says(tmp_path: Path) -> None:
    """The student's file and the ensemble's, read back with nothing but the library."""
    settings = tiny(tmp_path, methods=["di"])
    run_local(settings)
    test = dataset_of(settings).test
    accuracy = {row["method"]: row["accuracy"] for row in read(tmp_path, "summary.json")}
    assert evaluate(Ensemble.load(tmp_path / "uniform-ensemble.safetensors"), test).accuracy == accuracy["uniform ensemble"]
    from safetensors import safe_open

    with safe_open(tmp_path / "student-by-di.safetensors", "pt") as file:
        student = rebuild(json.loads(file.metadata()["model"]))
    student.load_state_dict(load_file(tmp_path / "student-by-di.safetensors"))
    assert evaluate(student, test).accuracy == accuracy["student by DI"]


@pytest.mark.parametrize("batch_norm", ["true", "false"])  # without it, both have tensors of the same names
def test_clients_may_have_unlike_models(tmp_path: Path, batch_norm: str) -> None:
    """Then nothing can be averaged, and the ensemble teaches the global architecture."""
    mixed = f"client_models=[{{name:lenet5,options:{{batch_norm:false}}}},{{name:lenet5_half,options:{{batch_norm:{batch_norm}}}}}]"
    run_local(tiny(tmp_path, mixed, methods=["di"]))
    assert [row["method"] for row in read(tmp_path, "summary.json")] == ["mean client", "uniform ensemble", "student by DI"]


def test_fedavg_averages_by_examples(tmp_path: Path) -> None:
    """The average of the saved client models, computed here, is the global model."""
    run_local(tiny(tmp_path, "strategy=fedavg", "rounds=2"))
    assert [row["method"] for row in read(tmp_path, "summary.json")] == ["mean client", "FedAvg"]
    rounds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds if line["stage"] == "candidate"] == [1, 2]


@pytest.mark.parametrize("strategy", ["fedavg", "data_free"])
def test_a_cohort_takes_part_in_each_round(tmp_path: Path, strategy: str) -> None:
    """Two clients of three, drawn anew each time; nobody else is trained or heard of."""
    run_local(tiny(tmp_path, f"strategy={strategy}", "rounds=4", "cohort=2", methods=["di"]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    cohorts = [[line["client"] for line in lines if line["stage"] == "client" and line["round"] == round] for round in (1, 2, 3, 4)]
    assert all(len(set(cohort)) == 2 and cohort == sorted(cohort) for cohort in cohorts) and len(set(map(tuple, cohorts))) > 1
    assert read(tmp_path, "summary.json")[0]["clients"] == 2


@pytest.mark.parametrize("strategy", ["fedavg", "data_free"])
def test_how_many_clients_a_node_hosts_changes_nothing(tmp_path: Path, strategy: str) -> None:
    """Five clients on five nodes, on three, the last of which hosts one, and on one; cohorts of four."""
    asked = (f"strategy={strategy}", "clients=5", "cohort=4", "rounds=2")
    for per in (1, 2, 5):
        run_local(tiny(tmp_path / str(per), *asked, f"clients_per_node={per}", methods=["di"]))
    assert_same(tmp_path / "1", tmp_path / "2")
    assert_same(tmp_path / "1", tmp_path / "5")


def test_sums_of_nodes_are_the_sums_of_their_clients(tmp_path: Path) -> None:
    """Up to the order of the additions in float64, which float32 does not see but for a last bit here and there."""
    asked = ("strategy=fedavg", "clients=5", "evaluate_clients=false")
    run_local(tiny(tmp_path / "each", *asked))
    for per in (1, 3):
        run_local(tiny(tmp_path / f"sums-{per}", *asked, "strategy.partial_sums=true", f"clients_per_node={per}"))
        one, two = (load_file(tmp_path / name / "fedavg.safetensors") for name in ("each", f"sums-{per}"))
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)
    lines = [json.loads(line) for line in (tmp_path / "sums-3" / "metrics.jsonl").read_text().splitlines()]
    assert [line["client"] for line in lines if line["stage"] == "client"] == [0, 1, 2, 3, 4]


def test_nobody_evaluates_what_nobody_sees(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'evaluate_clients' is True; allowed: false with strategy.partial_sums=true"):
        run_local(tiny(tmp_path, "strategy=fedavg", "strategy.partial_sums=true"))


@pytest.mark.parametrize("sums", ["true", "false"])
def test_a_client_that_fails_takes_no_other_of_its_node_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sums: str) -> None:
    train = client_app.train_partition

    def failing(settings: Settings, partition: int, *rest: object) -> Update:
        update = train(settings, partition, *rest)  # type: ignore[arg-type]
        if partition == 1:
            raise OSError("the disk is full")
        if partition == 2:
            next(iter(update.weights.values())).view(-1)[0] = math.nan
        return update

    monkeypatch.setattr(client_app, "train_partition", failing)
    asked = ("strategy=fedavg", "clients=4", "clients_per_node=4", "strategy.minimum_updates=2", "evaluate_clients=false")
    run_local(tiny(tmp_path, *asked, f"strategy.partial_sums={sums}"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["client"] for line in lines if line["stage"] == "client"] == [0, 3]
    excluded = read(tmp_path, "run.json")["excluded"]
    assert len(excluded) == 2 and "client 1, round 1" in excluded[0] and "the disk is full" in excluded[0]
    assert "client 2, round 1" in excluded[1] and "is not finite" in excluded[1]


def test_clients_need_not_be_evaluated(tmp_path: Path) -> None:
    run_local(tiny(tmp_path, "strategy=fedavg", "evaluate_clients=false"))
    assert [row["method"] for row in read(tmp_path, "summary.json")] == ["FedAvg"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    clients = [line for line in lines if line["stage"] == "client"]
    assert len(clients) == 3 and all("examples" in line and "test_accuracy" not in line for line in clients)


@pytest.mark.parametrize("weighting", ["examples", "label_counts"])
def test_the_ensemble_can_be_weighted(tmp_path: Path, weighting: str) -> None:
    consent = f"send_label_counts={str(weighting == 'label_counts').lower()}"
    run_local(tiny(tmp_path, f"strategy.weighting={weighting}", consent, "partition=dirichlet_per_class", methods=["di"]))
    manifest = read(tmp_path, "manifest.json")
    weights = load_file(tmp_path / f"{weighting}-ensemble.safetensors")["weights"]
    given = torch.tensor(manifest["counts"] if weighting == "label_counts" else [[size] for size in manifest["sizes"]]).double()
    torch.testing.assert_close(weights.double(), given / given.sum(0), atol=1e-6, rtol=0)


def test_label_counts_are_not_sent_without_consent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy.weighting.*client 0 sent none; set send_label_counts=true"):
        run_local(tiny(tmp_path, "strategy.weighting=label_counts", methods=["di"]))


def misbehaving(partition: int, how: str) -> ClientApp:
    """The client app, except that one partition misbehaves."""
    app = ClientApp()
    app.query()(client_app.who)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] != partition:
            return client_app.train(message, context)
        if how == "raises":
            raise OSError("the disk is full")
        asked = Instruction.from_record(message.content)
        update = client_app.train_partition(client_app.from_json(asked.settings), partition, asked)
        name = next(iter(update.weights))
        if how == "nan":
            update.weights[name].view(-1)[0] = math.nan
        elif how == "shape":
            update.weights[name] = update.weights[name][:1]
        elif how == "missing":
            del update.weights[name]
        return Message(answer_to_record([update], {}, sums=False), reply_to=message)

    return app


def run_with(app: ClientApp, settings) -> None:
    server_app.run(settings, LocalGrid(app, settings.clients, {}))


REASONS = {
    "raises": "client 1, round 1, local training: the client failed: .*the disk is full",
    "nan": "client 1, round 1, checking the update: tensor .* is not finite",
    "shape": "client 1, round 1, checking the update: tensor .* must be",
    "missing": "client 1, round 1, checking the update: a tensor is missing",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_bad_client_is_left_out_while_the_minimum_holds(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    run_with(misbehaving(1, how), tiny(tmp_path, "strategy.minimum_updates=2", methods=["di"]))
    rows = read(tmp_path, "summary.json")
    assert len(rows) == 5 - 1 and all(row["clients"] == 2 and row["excluded"] == 1 for row in rows)
    (reason,) = read(tmp_path, "run.json")["excluded"]
    assert re.search(REASONS[how], reason) and any("excluded: client 1" in record.getMessage() for record in caplog.records)
    assert reason.split(" (")[0] in (tmp_path / "report.html").read_text().replace("&#x27;", "'")


@pytest.mark.parametrize("sums", ["", "strategy.partial_sums=true"])
def test_what_a_client_raises_ends_a_run_that_is_debugged_and_it_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sums: str
) -> None:
    train = client_app.train_partition

    def raises(settings: Settings, partition: int, asked: Instruction, kept: dict[str, Tensor]) -> Update:
        if (partition, asked.round) == (1, 2):
            raise IndexError("no such label")
        return train(settings, partition, asked, kept)

    asked = ["strategy=fedavg", "rounds=2", "clients_per_node=2", "evaluate_clients=false", *filter(None, [sums])]
    run_local(tiny(tmp_path / "undisturbed", *asked))
    monkeypatch.setattr(client_app, "train_partition", raises)
    with pytest.raises(IndexError) as told:
        run_local(tiny(tmp_path / "debugged", *asked, "runtime.debug=true"))
    assert told.traceback[-1].name == "raises", "a debugger stops there"
    where, how_far = told.value.__notes__
    assert where == "client 1, round 2, local training" and how_far.startswith("round 2 of 2; the last that was heard of: training clients")
    run = read(tmp_path / "debugged", "run.json")
    assert run["status"] == "failed" and run["error"].startswith(
        "IndexError: no such label; client 1, round 2, local training; round 2 of 2"
    )
    monkeypatch.undo()
    run_local(tiny(tmp_path / "debugged", *asked, f"resume='{tmp_path / 'debugged'}'"))
    assert_same(tmp_path / "debugged", tmp_path / "undisturbed")


def test_what_fails_on_the_server_says_how_far_the_run_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object) -> None:
        raise IndexError("no such image")

    monkeypatch.setattr(recorder, "evaluate", evaluate)
    with pytest.raises(IndexError) as told:
        run_local(tiny(tmp_path, "strategy=fedavg", "evaluate_clients=false"))
    assert told.value.__notes__ == ["round 1 of 1; the last that was heard of: training clients, 3 of 3 clients"]


def test_a_wrong_setting_of_the_runner_is_one_line(tmp_path: Path) -> None:
    for setting, allowed in (("threads=0", "an integer >= 1"), ("debug=1", "true or false")):
        with pytest.raises(ConfigError, match=f"'runtime.{setting.split('=')[0]}' is .*; allowed: {allowed}"):
            run_local(tiny(tmp_path, f"runtime.{setting}"))


def test_without_a_compiler_a_run_that_wants_one_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FedimprError, match="^compiling a network: there is no C.. compiler. Install g.., or set compile=false"):
        run_local(tiny(tmp_path / "out", "compile=true", methods=["di"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_clients_compute_with_as_many_threads_as_the_settings_say(tmp_path: Path, count: int) -> None:
    before = torch.get_num_threads()
    tells = "training._target_=tests.sim.troubled_training.TellsThreads"
    run_local(tiny(tmp_path, tells, f"client_threads={count}", "runtime.threads=2", "strategy=fedavg"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["threads"] for line in lines if line["stage"] == "client"] == [count] * 3
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("how", REASONS)
def test_below_the_minimum_the_run_stops_and_says_why(tmp_path: Path, how: str) -> None:
    with pytest.raises(UpdateError, match=f"2 good updates of 3, below strategy.minimum_updates = 3; first: {REASONS[how]}"):
        run_with(misbehaving(1, how), tiny(tmp_path, methods=["di"]))
    run = read(tmp_path, "run.json")
    assert run["status"] == "failed" and "2 good updates of 3" in run["error"]
    assert (tmp_path / "report.html").exists() and (tmp_path / "partition.png").exists()


def test_what_cannot_be_resumed_stays_as_it_is(tmp_path: Path) -> None:
    run_local(tiny(tmp_path, methods=["di"]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="a run with rounds left; all 1 of this one are done"):
        run_local(tiny(tmp_path, f"resume='{tmp_path}'", methods=["di"]))
    with pytest.raises(ConfigError, match=r"resume.*differs in training.lr: 0.01 then, 0.02 now"):
        run_local(tiny(tmp_path, "training.lr=0.02", f"resume='{tmp_path}'", methods=["di"]))
    with pytest.raises(ConfigError, match="the result folder of a run; this one has no readable run.json"):
        run_local(tiny(tmp_path / "new", f"resume='{tmp_path / 'nothing'}'", methods=["di"]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_half_written_state_is_passed_over(tmp_path: Path) -> None:
    run_local(tiny(tmp_path, "rounds=2", methods=["di"]))
    state = tmp_path / "state/round-00002.safetensors"
    whole = {key: tensor.clone() for key, tensor in load_file(state).items()}  # not mapped from the file that is cut next
    state.write_bytes(state.read_bytes()[:500])
    run_local(tiny(tmp_path, "rounds=2", f"resume='{tmp_path}'", methods=["di"]))
    assert "one-shot FedAvg" in [row["method"] for row in read(tmp_path, "summary.json")]  # of the round before
    again = load_file(state)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def test_test_labels_decide_nothing_but_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the labels of the test set turned around, every weight stays what it was and every score changes."""
    run_local(tiny(tmp_path / "true", methods=["cmi", "di"]))
    data = dataset_of(tiny(tmp_path, methods=["cmi", "di"]))
    wrong = replace(data, test=replace(data.test, labels=(data.test.labels + 1) % 10))
    monkeypatch.setattr(recorder, "dataset_of", lambda settings: wrong)
    monkeypatch.setattr(recorder, "evaluation_of", lambda settings: (wrong.test, {}))
    run_local(tiny(tmp_path / "wrong", methods=["cmi", "di"]))
    files = sorted(path.name for path in (tmp_path / "true").glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        one, two = (load_file(tmp_path / folder / name) for folder in ("true", "wrong"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert read(tmp_path / "true", "summary.json")[2]["accuracy"] != read(tmp_path / "wrong", "summary.json")[2]["accuracy"]
