"""Flower's grid over Ray workers, and the runner on it: the same weights as in process, whatever happens to workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedimpr.errors import ConfigError, FedimprError, UpdateError
from sim import server_app
from sim.config import Settings
from sim.local import run_local
from sim.on_ray import run_on_ray, set_aside, variables
from sim.ray_grid import PROJECT, RayGrid
from tests.sim.test_flower import left_behind, linux
from tests.sim.test_on_ray import runtime
from tests.sim.tiny import assert_same, overrides, tiny

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 3

# Ray leaves pipes and processes of its own to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """One Ray for the module, with room enough whatever the machine has; of the GPU there is Ray's word alone."""
    ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def grid(
    workers: int = 2,
    clients: int = CLIENTS,
    name: str = "tests.sim.troubled:app",
    turn_seconds: float = 600.0,
    gpus: float = 0,
    cpu_workers: int = 0,
    **run_config: str,
) -> RayGrid:
    sizes = {"workers": workers, "cpus": 1, "gpus": gpus, "cpu_workers": cpu_workers, "turn_seconds": turn_seconds}
    return RayGrid(name, clients, run_config, **sizes, variables=variables(runtime()), tree=PROJECT)


@pytest.fixture(scope="module")
def standing(started: None) -> Iterator[RayGrid]:
    with grid(overrides="[]") as target:
        assert len(both_up(target)) == 2
        yield target


def ask(target: RayGrid, kind: str, nodes: list[int] | None = None, **config: float) -> list[Message]:
    content = RecordDict({"config": ConfigRecord(config)})
    return [Message(content, node, kind) for node in nodes or target.get_node_ids()]


def both_up(target: RayGrid) -> set[object]:
    """The process ids of the workers, once two have answered: a busy machine starts them one after another."""
    deadline, pids = time.monotonic() + 120, set[object]()
    while len(pids) < 2 and time.monotonic() < deadline:
        pids |= {reply.content["it"]["pid"] for reply in target.send_and_receive(ask(target, "query.up"))}
    return pids


class TestWithRay:
    pytestmark = [pytest.mark.ray, pytest.mark.slow]

    def test_replies_come_in_order_and_state_belongs_to_a_node_not_to_a_worker(self, standing: RayGrid) -> None:
        seen = []
        for _ in range(3):
            replies = standing.send_and_receive(ask(standing, "query.pid", list(reversed(standing.get_node_ids()))))
            assert [reply.metadata.src_node_id for reply in replies] == list(reversed(standing.get_node_ids()))
            seen += [dict(reply.content["it"]) for reply in replies]
        assert [one["turn"] for one in seen] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert len({one["pid"] for one in seen}) == 2 and os.getpid() not in {one["pid"] for one in seen}
        assert {one["overrides"] for one in seen} == {"[]"}

    def test_messages_to_one_node_are_answered_one_after_another(self, standing: RayGrid) -> None:
        node = standing.get_node_ids()[0]
        turns = [reply.content["it"]["turn"] for reply in standing.send_and_receive(ask(standing, "query.pid", [node] * 4))]
        assert turns == list(range(turns[0], turns[0] + 4))

    def test_shared_content_is_put_into_the_store_once_and_other_content_never(
        self, standing: RayGrid, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        puts, put = [], ray.put
        monkeypatch.setattr(ray, "put", lambda value: (puts.append(value), put(value))[1])
        nodes = standing.get_node_ids()
        contents = [RecordDict({"config": ConfigRecord({"n": n})}) for n in range(3)]
        to = [(contents[0], nodes[0]), (contents[1], nodes[1]), (contents[0], nodes[2]), (contents[2], nodes[0])]
        replies = standing.send_and_receive([Message(content, node, "query.echo") for content, node in to])
        assert [reply.content["config"]["n"] for reply in replies] == [0, 1, 0, 2]
        assert puts == [contents[0]]

    def test_replies_are_pulled_once_and_in_the_order_asked_for(self, standing: RayGrid) -> None:
        ids = standing.push_messages(ask(standing, "query"))
        deadline, got = time.monotonic() + 60, list[Message]()
        while len(got) < 2 and time.monotonic() < deadline:
            got += standing.pull_messages([ids[2], ids[0]])
        assert [reply.metadata.reply_to_message_id for reply in got] == [ids[2], ids[0]]
        assert standing.pull_messages(["unknown", ids[0]]) == []
        while len(got) < 3 and time.monotonic() < deadline:
            got += standing.pull_messages(ids)
        assert got[2].metadata.reply_to_message_id == ids[1] and standing._replies == {} == standing._letters

    def test_after_the_timeout_no_further_client_starts(self, standing: RayGrid) -> None:
        start = time.monotonic()
        assert standing.send_and_receive(ask(standing, "query.sleep", seconds=1.0), timeout=0.3) == []
        assert time.monotonic() - start < 0.9
        # Two workers were asleep for a second; the third message was never dealt, so its node answers at once.
        (reply,) = standing.send_and_receive(ask(standing, "query", [standing.get_node_ids()[2]]), timeout=30)
        assert reply.content["who"]["partition-id"] == 2 and len(standing._letters) <= 2

    def test_an_unknown_node_is_an_error(self, standing: RayGrid) -> None:
        with pytest.raises(FedimprError, match="no such node .value 7"):
            standing.push_messages(ask(standing, "query.who", [7]))

    def test_a_full_store_is_one_line(self, standing: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(value: object) -> None:
            raise ray.exceptions.ObjectStoreFullError("many\nlines")

        monkeypatch.setattr(ray, "put", full)
        with pytest.raises(FedimprError, match="^sending models between server and workers: Ray's object store is full. Free some space"):
            standing.push_messages(ask(standing, "query"))

    def test_flowers_own_fedavg_runs_on_it(self, started: None) -> None:
        with grid(name="tests.sim.test_grid:app") as target:
            strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
            result = strategy.start(target, ArrayRecord({"w": torch.zeros(2)}), num_rounds=2)
        # Client i adds i and has weight i + 1: one round adds (0*1 + 1*2 + 2*3) / 6 = 4/3, two rounds 8/3.
        torch.testing.assert_close(result.arrays.to_torch_state_dict()["w"], torch.full((2,), 8 / 3))

    def test_an_app_that_cannot_be_imported_ends_the_run_with_its_reason(self, started: None) -> None:
        wanted = (
            "^starting Ray's workers: 3 workers in a row did not come up: ModuleNotFoundError: No module named 'sim.nothing'. Every node"
        )
        with grid(workers=1, name="sim.nothing:app") as target, pytest.raises(FedimprError, match=wanted):
            target.send_and_receive(ask(target, "query.who"))

    def test_code_from_another_tree_is_refused(self, started: None, tmp_path: Path) -> None:
        sizes = {"workers": 1, "cpus": 1, "gpus": 0, "turn_seconds": 600.0}
        target = RayGrid("sim.client_app:app", 1, {}, **sizes, variables=variables(runtime()), tree=tmp_path)
        with target, pytest.raises(FedimprError, match="the workers import fedimpr from another folder"):
            target.send_and_receive(ask(target, "query.who"))

    def test_clients_with_models_of_their_own_train_the_same(self, started: None, tmp_path: Path) -> None:
        models = "client_models=[{name: lenet5, options: {batch_norm: false}}, {name: lenet5_half, options: {batch_norm: true}}]"
        run_local(tiny(tmp_path / "local", models, methods=["di"]))
        run_on_ray(tiny(tmp_path / "ray", models, "runtime=ray", "runtime.workers=2", methods=["di"]))
        assert_same(tmp_path / "local", tmp_path / "ray")

    def test_workers_with_a_share_of_a_gpu_and_without_work_side_by_side(self, started: None) -> None:
        """Those without see none, though Ray's other workers do."""
        with grid(workers=1, gpus=0.5, cpu_workers=1, clients=8) as target:
            deadline, seen = time.monotonic() + 120, dict[object, object]()
            while len(seen) < 2 and time.monotonic() < deadline:
                told = [reply.content["it"] for reply in target.send_and_receive(ask(target, "query.sees"))]
                seen |= {it["pid"]: it["gpus"] for it in told}
        assert sorted(map(str, seen.values())) == ["", "0"]

    def test_a_share_of_a_gpu_is_the_servers_and_goes_back(self, started: None) -> None:
        def free(wanted: float) -> bool:
            """Ray takes a moment to count."""
            deadline = time.monotonic() + 20
            while ray.available_resources().get("GPU", 0.0) != wanted and time.monotonic() < deadline:
                time.sleep(0.1)
            return ray.available_resources().get("GPU", 0.0) == wanted

        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        assert free(1.0)
        with set_aside(0.5):
            assert free(0.5) and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        assert free(1.0) and os.environ.get("CUDA_VISIBLE_DEVICES") == seen
        allowed = "what the GPUs of the server's machine have left; it has 1"
        with pytest.raises(ConfigError, match=f"'runtime.server_gpus' is 2; allowed: {allowed}"), set_aside(2):
            pass

    def test_clients_compute_with_as_many_threads_as_the_settings_say(self, started: None, tmp_path: Path) -> None:
        asked = ("training._target_=tests.sim.troubled_training.TellsThreads", "client_threads=2", "strategy=fedavg", "runtime=ray")
        run_on_ray(tiny(tmp_path, *asked, "runtime.workers=1", "runtime.cpus_per_worker=2", methods=["di"]))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["threads"] for line in lines if line["stage"] == "client"] == [2] * 3

    @pytest.mark.parametrize("server_work", ["here", "workers"])
    def test_what_workers_of_two_kinds_compute_on_the_cpu_is_what_one_process_does(
        self, started: None, tmp_path: Path, server_work: str
    ) -> None:
        asked = ("device=cpu", "rounds=2", "strategy=data_free")
        run_local(tiny(tmp_path / "local", *asked, methods=["ci", "di"]))
        mixed = ("runtime.workers=1", "runtime.gpus_per_worker=0.5", "runtime.cpu_workers=1", f"runtime.server_work={server_work}")
        run_on_ray(tiny(tmp_path / "ray", *asked, "runtime=ray", *mixed, methods=["ci", "di"]))
        assert_same(tmp_path / "local", tmp_path / "ray")

    def trouble(self, folder: Path, how: str, *more: str, turn_seconds: float = 600.0) -> Settings:
        settings = tiny(folder / "run", "strategy=fedavg", *more, methods=["di"])
        with grid(how=how, flag=str(folder / "flag"), turn_seconds=turn_seconds) as target:
            server_app.run(settings, target)
        return settings

    @pytest.mark.parametrize("how", ["killed", "leaves", "hangs", pytest.param("out of memory", marks=linux)])
    def test_a_lost_worker_does_not_change_the_weights(
        self, started: None, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        run_local(tiny(tmp_path / "local", "strategy=fedavg", methods=["di"]))
        self.trouble(tmp_path, how, turn_seconds=30.0 if how == "hangs" else 600.0)
        assert (tmp_path / "flag").exists() and "a worker is lost and replaced" in caplog.text
        assert_same(tmp_path / "local", tmp_path / "run")
        assert json.loads((tmp_path / "run/run.json").read_text())["excluded"] == []

    def test_a_client_that_takes_two_workers_along_is_left_out_by_name(self, started: None, tmp_path: Path) -> None:
        self.trouble(tmp_path, "always killed", "strategy.minimum_updates=2")
        (reason,) = json.loads((tmp_path / "run/run.json").read_text())["excluded"]
        assert reason.startswith("client 1, round 1, local training: the client failed: the worker died twice: Worker unexpectedly exits")
        assert "\n" not in reason

    @linux
    def test_a_client_that_runs_out_of_memory_is_named_its_worker_replaced_and_the_others_go_on(
        self, started: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It asks for 4 GiB where its process may have 2, on two workers one after another."""
        self.trouble(tmp_path, "always out of memory", "strategy.minimum_updates=2")
        (reason,) = json.loads((tmp_path / "run/run.json").read_text())["excluded"]
        assert reason.startswith(
            "client 1, round 1, local training: the client failed: the worker died twice: out of memory: 4294967296 bytes more"
        )
        assert caplog.text.count("a worker is lost and replaced: out of memory") == 2
        assert [row["clients"] for row in json.loads((tmp_path / "run/summary.json").read_text())] == [2, 2]

    @pytest.mark.parametrize(("how", "told"), [("always killed", "the worker died twice"), ("raises", "OSError: the disk is full")])
    def test_below_the_minimum_the_run_stops_and_says_why(self, started: None, tmp_path: Path, how: str, told: str) -> None:
        wanted = (
            f"2 good updates of 3, below strategy.minimum_updates = 3; first: client 1, round 1, local training: the client failed: {told}"
        )
        with pytest.raises(UpdateError, match=wanted):
            self.trouble(tmp_path, how)

    def test_nothing_of_a_grid_is_left_when_it_is_closed(self, started: None) -> None:
        with grid() as target:
            pids = {reply.content["it"]["pid"] for reply in target.send_and_receive(ask(target, "query.pid"))}
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# --- in a process of its own --------------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_takes_everything_along(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Stopped in training, as Ctrl-C does it: the whole group gets the signal."""
    word = f"mark-{uuid.uuid4().hex}"
    settings = overrides("training.epochs=100000", "runtime=ray", f"output='{tmp_path}'", methods=["di"])
    process = subprocess.Popen(
        [sys.executable, "-m", "sim", *settings],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "FEDIMPR_TEST_MARK": word},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not ((tmp_path / "metrics.jsonl").exists() and "training clients" in (tmp_path / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    time.sleep(3)
    assert len(left_behind(word)) > 4
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert [line for line in err.splitlines() if "raylet" in line or "Traceback" in line] == [] and "raylet" not in out
    deadline = time.monotonic() + 10
    while left_behind(word) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_behind(word) == []
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


NODES = """
import time
from ray.cluster_utils import Cluster
from sim.environment import quiet
quiet()
from sim.on_ray import running, variables
from tests.sim.test_ray_grid import ask, both_up, grid
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
leaving = cluster.add_node(num_cpus=1)
with running(cluster.address, {}), grid(clients=6) as target:
    assert len(both_up(target)) == 2
    target.send_and_receive(ask(target, "query.pid"))
    ids = target.push_messages(ask(target, "query.sleep", seconds=2.0))
    time.sleep(1.0)
    cluster.remove_node(leaving, allow_graceful=False)
    replies, deadline = [], time.monotonic() + 200
    while len(replies) < 6 and time.monotonic() < deadline:
        replies += target.pull_messages(ids[len(replies):len(replies) + 1])
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids, replies
    assert not any(reply.has_error() for reply in replies), [reply.error for reply in replies if reply.has_error()]
    again = target.send_and_receive(ask(target, "query.pid"))
    assert [reply.content["it"]["turn"] for reply in again] == [2] * 6
    assert len({reply.content["it"]["pid"] for reply in again}) == 1
cluster.shutdown()
print("done")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_leaving_node_was_at_is_done_by_those_that_stay() -> None:
    """Two nodes on this machine, one worker on each; one goes while both are at work. The other does all six turns' rest alone."""
    ended = subprocess.run([sys.executable, "-c", NODES], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.stdout.splitlines()[-1:] == ["done"], ended.stderr[-2000:]
