"""What clients keep between rounds: by partition, in files, and the same on every runner and however often a run is stopped."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from fedimpr import seeds
from fedimpr.data import Images
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.training import LocalTraining
from fedimpr.views import Views
from sim import client_app, server_app
from sim.client_states import KEPT, ClientStates, record_of, states_of
from sim.config import Settings
from sim.grid import LocalGrid
from sim.local import run_local
from strategies.records import Instruction, answer_to_record
from strategies.tensors import from_arrays, to_arrays
from tests.makers import Linear
from tests.sim.test_resume import Stopped, stopping
from tests.sim.tiny import assert_same, tiny, weights

MOMENTUM = ("strategy=fedavg", "rounds=3", "training.momentum_kept=true", "evaluate_clients=false")


# --- the method that keeps something ---


def test_momentum_goes_on_where_the_last_turn_left_it() -> None:
    """Two turns of one step each, of the same images, are two steps of SGD: v = 0.5 v + g, w = w - 0.1 v."""
    as_is = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)
    settings = {"epochs": 1, "batch_size": 2, "lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "clip": 100.0, "views": as_is}
    images = Images(torch.tensor([[255, 0], [255, 0]], dtype=torch.uint8).view(2, 1, 1, 2), torch.tensor([0, 0]), ("a", "b"))
    model, kept = Linear([[0.0, 0.0], [0.0, 0.0]]), dict[str, torch.Tensor]()
    w, v = torch.zeros(2, 2), torch.zeros(2, 2)
    for turn in range(2):
        LocalTraining(**settings, momentum_kept=True)(model, images, seeds.generator(0, "x", turn), momentum=kept)
        p = (w @ torch.tensor([1.0, 0.0])).softmax(0)  # of the image (1, 0), whose class is 0
        g = torch.outer(p - torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
        v = 0.5 * v + g
        w = w - 0.1 * v
        torch.testing.assert_close(next(iter(model.parameters())).detach().view(2, 2), w)
        assert [tensor.shape for tensor in kept.values()] == [parameter.shape for parameter in model.parameters()]
        torch.testing.assert_close(next(iter(kept.values())).view(2, 2), v)


def test_momentum_without_momentum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'training.momentum_kept' is True; allowed: false without momentum"):
        run_local(tiny(tmp_path, *MOMENTUM, "training.momentum=0", methods=["di"]))


# --- the files ---


def test_a_turn_begins_with_what_was_kept_before_its_round_whatever_was_kept_since(tmp_path: Path) -> None:
    states = ClientStates(tmp_path, 1)
    assert states.before(3, 9) == {}
    for round in (2, 5):
        states.keep(3, round, {"v": torch.tensor([float(round)])})
    assert [states.before(3, round).get("v", torch.zeros(1)).item() for round in (1, 2, 3, 5, 6, 9)] == [0, 0, 2, 2, 5, 5]
    states.keep(3, 5, {"v": torch.tensor([7.0])})  # the turn was made again
    assert states.before(3, 6)["v"].item() == 7 and states.before(4, 9) == {}


def test_as_many_are_kept_as_a_run_may_go_on_from(tmp_path: Path) -> None:
    states = ClientStates(tmp_path, 1)
    for round in range(1, 6):
        states.keep(0, round, {"v": torch.zeros(1)})
    assert KEPT == 3 and sorted(path.stem for path in tmp_path.rglob("*.*")) == ["round-00003", "round-00004", "round-00005"]


def test_a_damaged_file_is_named_and_not_passed_over(tmp_path: Path) -> None:
    states = ClientStates(tmp_path, 1)
    states.keep(3, 2, {"v": torch.zeros(100)})
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FedimprError, match="^client 3, round 2, reading what it kept: .* is damaged: .* Start the run anew"):
        states.before(3, 3)


def test_what_a_node_hosts_is_told_apart_and_leaves_nothing_in_its_context(tmp_path: Path) -> None:
    """Partitions 2 and 3 live on the node at place 1; 3 takes no part."""
    states, state = ClientStates(tmp_path, 2), RecordDict()
    asked = Instruction(weights={}, round=4, settings="", cohort=[0, 2], sums=False)
    message = Message(asked.to_record(), 7, "train")
    for partition in (0, 2, 3):
        states.keep(partition, 1, {"v": torch.tensor([float(partition)])})
    states.bring(message, 1, state)
    assert list(state) == [record_of(2)]
    state[record_of(2)] = to_arrays({"v": torch.tensor([20.0])})
    states.take(message, 1, state)
    assert not state and states.before(2, 5)["v"].item() == 20 and states.before(2, 4)["v"].item() == 2
    states.bring(Message(RecordDict(), 7, "query"), 1, state)
    assert not state


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(FedimprError, match="^client 1, round 2, writing what it keeps: cannot write .*: .* Free some space"):
        ClientStates(tmp_path, 1).keep(1, 2, {"v": torch.zeros(1)})


def test_memory_does_not_grow_with_the_clients(tmp_path: Path) -> None:
    """A thousand clients, two rounds: of what the others have brought or left nothing is there any more when a client has its turn."""
    seen: list[weakref.ref] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        place, round = int(context.node_config["partition-id"]), int(message.content["config"]["round"])
        assert not any(one() is not None for one in seen)
        brought = context.state.get(record_of(place))
        assert (round == 1) == (brought is None)
        if brought is not None:
            assert from_arrays(brought)["v"].tolist() == [place, round - 1]
        left = to_arrays({"v": torch.tensor([place, round])})
        seen[:] = [weakref.ref(record["v"]) for record in (brought, left) if record is not None]
        context.state[record_of(place)] = left
        return Message(answer_to_record([], {}, sums=False), reply_to=message)

    grid = LocalGrid(app, 1000, {})
    grid.states = ClientStates(tmp_path, 1)
    for round in (1, 2):
        content = Instruction(weights={}, round=round, settings="", cohort=list(range(1000)), sums=False).to_record()
        for one in grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()]):
            (reply,) = grid.pull_messages([one])
            assert not reply.has_error(), reply.error
    assert not any(context.state for context in grid._contexts.values())
    assert ClientStates(tmp_path, 1).before(999, 3)["v"].tolist() == [999, 2]


# --- runs ---


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run_local(tiny(folder, *MOMENTUM, methods=["di"]))
    return folder


def test_what_is_kept_makes_a_difference_from_the_second_round_on(tmp_path: Path, straight: Path) -> None:
    run_local(tiny(tmp_path, *MOMENTUM, "training.momentum_kept=false", methods=["di"]))
    assert not (tmp_path / "state/clients").exists()
    assert len(list((straight / "state/clients").iterdir())) == 3
    one, two = (load_file(folder / "state/round-00002.safetensors") for folder in (tmp_path, straight))
    name = next(name for name in one if name.startswith("global/") and one[name].is_floating_point())
    assert not torch.equal(one[name], two[name])


@pytest.mark.parametrize("savings", [1, 2])
def test_stopped_after_a_round_it_goes_on_to_the_same_weights(tmp_path: Path, straight: Path, savings: int) -> None:
    with stopping(savings), pytest.raises(Stopped):
        run_local(tiny(tmp_path, *MOMENTUM, methods=["di"]))
    run_local(tiny(tmp_path, *MOMENTUM, f"resume='{tmp_path}'", methods=["di"]))
    assert_same(tmp_path, straight)


def test_stopped_inside_a_round_it_goes_on_in_another_folder_to_the_same_weights(tmp_path: Path, straight: Path) -> None:
    """Two clients have had their turn in the second round, and kept what it left; they have it again."""
    train, turns = client_app.train_partition, [0]

    def stops(settings: Settings, *rest: object):
        turns[0] += 1
        if turns[0] == 6:
            raise Stopped
        return train(settings, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_app, "train_partition", stops)
        with pytest.raises(Stopped):
            run_local(tiny(tmp_path / "one", *MOMENTUM, methods=["di"]))
    run_local(tiny(tmp_path / "two", *MOMENTUM, f"resume='{tmp_path / 'one'}'", methods=["di"]))
    assert_same(tmp_path / "two", straight)


def test_a_run_that_begins_anew_finds_nothing_of_an_earlier_one(tmp_path: Path, straight: Path) -> None:
    states = ClientStates(tmp_path, 1)
    states.keep(0, 1, {"nothing": torch.zeros(1)})
    run_local(tiny(tmp_path, *MOMENTUM, methods=["di"]))
    assert_same(tmp_path, straight)


def test_where_nobody_keeps_it_a_run_is_not_resumed(tmp_path: Path) -> None:
    settings = tiny(tmp_path, *MOMENTUM, methods=["di"])
    grid = LocalGrid(client_app.app, 3, {})  # without states, as Flower's own
    with pytest.raises(ConfigError, match="'resume' is .*; allowed: null with training.momentum_kept=true on this runner"):
        server_app.run(replace(settings, resume=str(tmp_path)), grid)
    assert states_of(settings) is not None and states_of(tiny(tmp_path, methods=["di"])) is None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves pipes to the garbage collector
@pytest.mark.parametrize("workers", [1, 2])
def test_it_does_not_matter_which_process_plays_a_client(tmp_path: Path, straight: Path, workers: int) -> None:
    from sim.on_ray import run_on_ray

    run_on_ray(tiny(tmp_path, *MOMENTUM, "runtime=ray", f"runtime.workers={workers}", methods=["di"]))
    assert_same(tmp_path, straight)
    assert weights(tmp_path)
