"""Continual updates through the whole house: every row of ``configs/continual``, resumed, on every runner, and what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Impressions
from fedimpr.models import final_layer, in_every_turn
from fedimpr.synthesis import DataImpressions
from sim import plots
from sim.by_task import matrices, write_matrices
from sim.config import CONFIGS, Settings, composed
from sim.federation import course_of, strategy_of
from sim.local import run_local
from sim.weights import read_model, weights_hash
from strategies import Nobody
from strategies.continual import Continual, turned_back
from tests.sim.adapting_tiny import SHIFTED
from tests.sim.tiny import assert_same, overrides

ROWS = sorted(path.stem for path in (CONFIGS / "continual").glob("*.yaml"))
QUICK = ("di", "finetuning", "target")  # for the others a second or more each
STREAMS = ("split_mnist_shards", "split_mnist")

CONSOLIDATION = (
    "strategy.consolidation={_target_: fedimpr.training.LocalTraining, epochs: 1, batch_size: 8, lr: 0.01, momentum: 0.9, "
    "momentum_kept: false, weight_decay: 0.0, clip: 10.0, views: ${training.views}}"
)


def stream(output: Path, row: str, *more: str) -> Settings:
    """Digits in three tasks, three clients, a round each; whatever mines is shrunk."""
    chosen = composed([f"continual={row}", "tasks=class_incremental", "tasks.scenario.tasks=[4,3,3]"])
    small = [part for part in overrides(methods=list(chosen.synthesis)) if not part.startswith("synthesis=")]
    small += [f"synthesis.{name}.mining.images=120" for name in chosen.synthesis]  # some of every class
    tasks = ["tasks=class_incremental", "tasks.scenario.tasks=[4,3,3]", "tasks.rounds=1", "partition=iid"]
    return composed([f"continual={row}", *tasks, *small, f"output='{output}'", *more])


@pytest.mark.parametrize("row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS])
def test_every_row_learns_task_after_task(row: str, tmp_path: Path) -> None:
    run_local(stream(tmp_path, row))
    told = json.loads((tmp_path / "continual.json").read_text())
    assert len(told["tasks"]) == 3
    for found in told["methods"].values():
        matrix = found["matrix"]
        assert [[value is None for value in line] for line in matrix] == [[False, True, True], [False, False, True], [False] * 3]
        assert 0 <= found["measures"]["last_accuracy_over_images"] <= 1 and -1 <= found["measures"]["forgetting"] <= 1
    assert (tmp_path / "accuracy_matrix.png").stat().st_size > 1000
    assert "Results by task" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("row", ["lander", "mfcl", "target"])
def test_a_published_row_learns_in_every_quarter_turn_where_it_is_asked_to(row: str, tmp_path: Path) -> None:
    """Ten classes in four turns: forty outputs within, ten without."""
    run_local(stream(tmp_path, row, "+model.options.turned=true"))
    model, images = read_model(tmp_path / "fedavg.safetensors", "model", (1, 8, 8))[0], torch.zeros(1, 1, 8, 8)
    assert model(images).shape == (1, 10) and in_every_turn(model)(images).shape == (1, 40)
    (found,) = json.loads((tmp_path / "continual.json").read_text())["methods"].values()
    assert None not in found["matrix"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("turns", [False, True])
def test_lander_looks_at_names_where_the_user_has_them_and_says_so(turns: bool, tmp_path: Path) -> None:
    file = tmp_path / "names.safetensors"
    save_file({"embeddings": torch.randn(10, 4, generator=torch.Generator().manual_seed(0))}, file)
    named = f"strategy.rehearsal.embeddings='{file}'"
    weights = []
    for folder, more in (("with", [named]), ("without", [])):
        run_local(stream(tmp_path / folder, "lander", f"+model.options.turned={turns}", *more))
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        origin = "from names.safetensors" if more else "learned"
        assert [line["notes"] for line in lines if "notes" in line] == [[f"class embeddings: {origin}"]] * 3
        weights.append(load_file(tmp_path / folder / "fedavg.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_file_of_names_must_have_a_row_for_each_class_of_the_data_set(tmp_path: Path) -> None:
    save_file({"embeddings": torch.randn(9, 4)}, file := tmp_path / "names.safetensors")
    with pytest.raises(
        ConfigError, match="'strategy.rehearsal.embeddings' is '.*'; allowed: a file with 10 rows, one a class .*; it has 9"
    ):
        run_local(stream(tmp_path / "refused", "lander", f"strategy.rehearsal.embeddings='{file}'"))


@pytest.mark.parametrize("row", ["cmi", "lander", "finetuning"])
def test_where_clients_have_one_class_of_a_task_every_row_learns_in_every_turn(row: str) -> None:
    """The stream of quantity skew is split_mnist but for its partition and its network, and the network is the same in every row."""
    skewed, stream = (json.loads(composed([f"experiment={name}", f"continual={row}"]).to_json()) for name in STREAMS)
    assert skewed["partition"] == {"_target_": "fedimpr.data.partition.Shards", "per_client": 2}
    assert skewed["model"] == {"name": "lenet5", "options": {"batch_norm": True, "turned": True}}
    changed = {key for key in skewed if skewed[key] != stream[key]}
    assert changed - {"model"} == {"name", "partition"}


@pytest.fixture
def fluent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data impressions show what they are asked for, one output after the other, as those of a model do that has learnt something."""

    def synthesize(self, teacher, count, generator, *, shape, student=None, progress=None) -> Impressions:
        with torch.no_grad():
            outputs = teacher(torch.zeros(1, *shape)).shape[1]
        labels = torch.arange(count) % outputs
        return Impressions(torch.rand(count, *shape, generator=generator), torch.eye(outputs)[labels], labels, count)

    monkeypatch.setattr(DataImpressions, "synthesize", synthesize)


class Stopped(Exception):
    """As if the process had been killed."""


@pytest.mark.parametrize(
    ("row", "round"), [("di", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("di", 1), ("target", 1), ("target", 2)))]
)
def test_stopped_inside_a_task_it_goes_on_to_the_same_weights(
    row: str, round: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_local(stream(tmp_path / "straight", row, "tasks.rounds=2", "save_seconds=0"))
    from sim.recorder import Recorder

    whole = Recorder.mined

    def mined(self, at: int, *given) -> None:
        if at == 2 * round:
            raise Stopped
        whole(self, at, *given)

    monkeypatch.setattr(Recorder, "mined", mined)
    with pytest.raises(Stopped):
        run_local(stream(tmp_path / "stopped", row, "tasks.rounds=2", "save_seconds=0"))
    monkeypatch.undo()
    run_local(stream(tmp_path / "stopped", row, "tasks.rounds=2", "save_seconds=0", f"resume='{tmp_path}/stopped'"))
    assert_same(tmp_path / "straight", tmp_path / "stopped")
    assert (tmp_path / "straight/continual.json").read_bytes() == (tmp_path / "stopped/continual.json").read_bytes()


@pytest.mark.usefixtures("fluent")
def test_the_server_may_replay_and_late_and_slow_clients_take_part(tmp_path: Path) -> None:
    settings = stream(
        tmp_path / "run",
        "di",
        "strategy.replay=server",
        "strategy.mines=new",
        CONSOLIDATION,
        "tasks.joins=[0,1,0]",
        "tasks.behind=[0,0,1]",
    )
    run_local(settings)
    told = json.loads((tmp_path / "run/continual.json").read_text())["methods"]
    assert list(told) == ["FedAvg", "server replay of DI"]
    clients = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"client"' in line]
    assert [line["client"] for line in clients if line["stage"] == "client"] == [0, 0, 1, 2, 0, 1, 2]


def test_domains_may_arrive_one_after_another_and_the_initial_model_is_measured(tmp_path: Path) -> None:
    from fedimpr.continual.course import plan_course
    from fedimpr.continual.stream import DomainIncremental
    from fedimpr.data import Dataset, Images
    from fedimpr.data.partition import Iid

    def images(count: int) -> Images:
        return Images(
            torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count) % 2, ("a", "b"), torch.arange(count) // 2 % 2, ("x", "y")
        )

    course = plan_course(
        DomainIncremental(order=("x", "y")), Dataset("toy", images(40), images(8)), Iid(),
        clients=2, rounds=1, joins=None, behind=None, minimum=1, seed=0,
    )  # fmt: skip
    lines = [
        {"stage": "initial", "round": 0, "tasks": [0.5, 0.25]},
        {"stage": "candidate", "round": 1, "method": "FedAvg", "tasks": [0.75, 0.5]},
        {"stage": "candidate", "round": 2, "method": "FedAvg", "tasks": [0.25, 1.0]},
    ]
    assert torch.equal(matrices(lines, course)["FedAvg"], torch.tensor([[0.75, 0.5], [0.25, 1.0]]))
    write_matrices(tmp_path, lines, course)
    measures = json.loads((tmp_path / "continual.json").read_text())["methods"]["FedAvg"]["measures"]
    assert measures["forgetting"] == 0.5 and measures["backward_transfer"] == -0.5  # 0.75 - 0.25
    assert measures["forward_transfer"] == 0.25  # 0.5 - 0.25


def test_a_task_that_is_not_over_has_no_line_in_the_matrix() -> None:
    course = course_of(stream(Path("unused"), "finetuning", "tasks.rounds=2"))
    assert course is not None
    line = {"stage": "candidate", "method": "FedAvg", "tasks": [0.5, None, None]}
    assert matrices([{**line, "round": 1}], course) == {}
    assert matrices([{**line, "round": 2}, {**line, "round": 3}], course)["FedAvg"].tolist() == [[0.5]]


def test_impressions_of_every_task_get_a_picture(tmp_path: Path) -> None:
    run_local(stream(tmp_path, "di"))
    assert [path.name for path in sorted(tmp_path.glob("impressions-task-*.png"))] == [f"impressions-task-00{n}.png" for n in (1, 2, 3)]
    assert plots.DPI  # the pictures are those of the report


@pytest.mark.usefixtures("fluent")
def test_new_classes_join_the_bank_in_equal_shares(tmp_path: Path) -> None:
    """Room for thirty: of 4 classes 30 // 4 = 7 each at most, then 30 // 7 = 4, then 30 // 10 = 3; the oldest of a class stay."""
    strategy = strategy_of(stream(tmp_path, "di", "strategy.mines=new"), Nobody())
    assert isinstance(strategy, Continual) and strategy.bank.capacity == 30
    before: list[Tensor] = []
    for step, (classes, share) in enumerate([(4, 7), (7, 4), (10, 3)]):
        strategy._mine(strategy.federation.build(None, classes), step, step + 1)
        now = [strategy.bank.images[strategy.bank.labels == k] for k in range(classes)]
        assert [len(images) for images in now] == [share] * classes
        assert all(torch.equal(images, old[:share]) for images, old in zip(now, before, strict=False))
        before = now


def test_the_model_that_answers_is_adjusted_and_the_one_that_goes_on_is_not(tmp_path: Path) -> None:
    """A step shows 8 own images of 3 new classes and 12 of 4 that are remembered: their logits lose ln(8/3) and ln 3."""
    strategy = strategy_of(stream(tmp_path, "di", "training.batch_size=8", "strategy.rehearsal.batch_size=12"), Nobody())
    assert isinstance(strategy, Continual)
    model = strategy.federation.build(None, 7).eval()
    weights, images = weights_hash(model.state_dict()), torch.rand(5, 1, 8, 8)
    lost = torch.tensor([3.0] * 4 + [8 / 3] * 3).log()
    torch.testing.assert_close(strategy._adjusted(model, 1)(images), model(images) - lost)
    assert weights_hash(model.state_dict()) == weights
    assert strategy._adjusted(model, 0) is model  # nothing is remembered yet
    untouched = strategy_of(stream(tmp_path, "target"), Nobody())
    assert isinstance(untouched, Continual) and untouched._adjusted(model, 1) is model


@pytest.mark.parametrize("where", ["clients", "server"])
@pytest.mark.usefixtures("fluent")
def test_what_is_saved_and_evaluated_is_the_model_that_answers(where: str, tmp_path: Path) -> None:
    biases = []
    for own in ("null", "8"):
        more = (f"strategy.own_batch_size={own}", f"strategy.replay={where}", CONSOLIDATION, "strategy.rehearsal.batch_size=14")
        run_local(stream(tmp_path / own, "di", *more))
        file = "fedavg" if where == "clients" else "server-replay-of-di"
        biases.append(final_layer(read_model(tmp_path / own / f"{file}.safetensors", "model", (1, 8, 8))[0]).bias)
    of_task = [2.0] * 28 + [8 / 3] * 12  # seven earlier classes share fourteen images, three new ones eight
    torch.testing.assert_close(biases[0] - biases[1], torch.tensor(of_task).log())


def test_own_images_a_step_are_one_or_more(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own_batch_size' is 0; allowed: null, or an integer >= 1"):
        strategy_of(stream(tmp_path, "di", "strategy.own_batch_size=0"), Nobody())


@pytest.mark.usefixtures("fluent")
def test_a_class_without_an_impression_stops_a_server_that_replays(tmp_path: Path) -> None:
    """Four images are of the first class, which has outputs 0 to 3: of the four classes that task 1 brings three have none."""
    few = ("synthesis.di.mining.images=4", "synthesis.di.mining.portions=1", "strategy.replay=server", CONSOLIDATION)
    with pytest.raises(
        FedimprError, match=r"round 1, mining di: the server has no impression of class \d, \d, \d. Raise synthesis.di.mining"
    ):
        run_local(stream(tmp_path, "di", *few))


def test_an_impression_is_remembered_as_what_the_model_takes_it_for(tmp_path: Path) -> None:
    strategy = strategy_of(stream(tmp_path, "di"), Nobody())
    assert isinstance(strategy, Continual)
    model = strategy.federation.build(None, 4).eval()
    strategy._mine(model, 0, 1)
    images = (strategy.bank.images * 255).round() / 255
    whole = torch.stack([in_every_turn(model)(torch.rot90(images, q, (2, 3))).detach() for q in range(4)], 1)  # (N, turn, outputs)
    decided = whole.argmax(2)  # in some turn the image is what the model took it for, that class in that turn
    assert bool((decided == 4 * strategy.bank.labels[:, None] + torch.arange(4)).any(1).all())


@pytest.mark.usefixtures("fluent")
def test_a_domain_brings_all_its_classes_and_each_domain_keeps_its_share(tmp_path: Path) -> None:
    """Room for thirty: of ten classes in one domain 30 // 10 = 3 each, then of ten in two 30 // 20 = 1; the oldest stay."""
    small = [part for part in overrides(methods=["di"]) if not part.startswith("synthesis=")]
    domains = ["tasks=domain_incremental", "tasks.rounds=1", "partition=iid", "dataset.source=shifted", SHIFTED]
    settings = composed(["continual=di", *small, *domains, "synthesis.di.mining.images=120", f"output='{tmp_path}'"])
    strategy = strategy_of(settings, Nobody())
    assert isinstance(strategy, Continual) and len(strategy.course.tasks) == 3 and not strategy.course.tasks[1].new
    for step, share in enumerate([3, 1, 1]):
        strategy._mine(strategy.federation.build(None, 10), step, step + 1)
        held = [[int((strategy.bank.labels[strategy.bank.came_from(s)] == k).sum()) for k in range(10)] for s in strategy.bank.sources]
        assert held == [[share] * 10] * (step + 1)
    run_local(settings)


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_memory_is_bounded_over_a_hundred_tasks(tmp_path: Path) -> None:
    """A bank of thirty impressions and the two newest states, however many tasks there were."""
    from fedimpr.states import size_of

    settings = stream(tmp_path, "di", "strategy.rehearsal.batch_size=4")
    strategy = strategy_of(settings, Nobody())
    model = strategy.federation.build(None, 10)
    sizes = []
    for _ in range(100):
        strategy._mine(model, 2, 3)  # type: ignore[union-attr]
        sizes.append(size_of(strategy.state_dict()))
    assert len(strategy.bank) == 30 and sizes[-1] <= sizes[5] + 10  # digits of a count


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tasks.scenario.tasks=[4,3,2]", "config key 'tasks.scenario.tasks' is .*that add up to the 10 classes"),
        ("tasks.scenario.tasks=[1,3,6]", "a first task of two classes or more"),
        ("tasks.joins=[0,0]", "config key 'tasks.joins' is"),
        ("tasks.scenario.order=[0,0,1,2,3,4,5,6,7,8]", "config key 'tasks.scenario.order' is"),
        ("rounds=3", "config key 'rounds' is 3; allowed: 1 with tasks"),
        ("strategy.replay=server", "config key 'strategy.replay' is 'server'"),
        ("strategy.exemplars=-1", "config key 'strategy.exemplars' is -1"),
        ("devices=phones", "config key 'devices' is|config key 'strategy.devices' is"),
        ("strategy=fedavg", "config key 'tasks' is 'some'; allowed: set with strategy=continual"),
        ("training.momentum_kept=true", "config key 'training.momentum_kept' is True; allowed: false with tasks"),
        ("minimum=1000", "in task 0|task 0"),
    ],
)
def test_bad_input_is_one_line(wrong: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, FedimprError), match=message):
        run_local(stream(tmp_path, "finetuning", wrong))


def test_a_model_that_knows_turns_is_refused_where_nothing_teaches_it(tmp_path: Path) -> None:
    small = [part for part in overrides(methods=["di"]) if not part.startswith("synthesis=")]
    with pytest.raises(ConfigError, match="config key 'model.options.turned' is True; allowed: false without tasks"):
        run_local(composed(["synthesis=[di]", *small, "+model.options.turned=true", f"output='{tmp_path}'"]))


def test_impressions_of_turned_classes_come_back_upright() -> None:
    """Class 1 in its third turn, output 7, turned back by three quarters; its probability is that of all four turns."""
    images = torch.rand(2, 1, 4, 4)
    targets = torch.tensor([[0.1, 0.0, 0.0, 0.2, 0.3, 0.0, 0.1, 0.3], [0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]])
    found = turned_back(Impressions(images, targets, torch.tensor([7, 0]), 3))
    assert torch.equal(found.images[0], torch.rot90(images[0], -3, (1, 2))) and torch.equal(found.images[1], images[1])
    assert found.labels.tolist() == [1, 0] and found.teacher_passes == 3
    torch.testing.assert_close(found.targets, torch.tensor([[0.3, 0.7], [1.0, 0.0]]))
