"""The runner on Ray without its grid: settings, room for workers, how Ray starts."""

from __future__ import annotations

import importlib
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import ray

from fedimpr.errors import ConfigError, FedimprError
from sim._ray import SUPERFLUOUS, Node, without_spare_processes
from sim.config import call, composed
from sim.on_ray import Runtime, _import_meanwhile, room, run_on_ray, running
from sim.signals import Terminated, listening
from tests.sim.tiny import tiny

ROOT = Path(__file__).resolve().parents[2]
AS_SHIPPED = composed(["runtime=ray"]).runtime


def runtime(**changes: object) -> Runtime:
    """``configs/runtime/ray.yaml`` with changes."""
    return call(Runtime, {**AS_SHIPPED, **changes}, "runtime")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("threads", 0, "an integer >= 1"),
        ("workers", 0, "null or an integer >= 1"),
        ("workers", 1.5, "an integer or null"),
        ("cpus_per_worker", 0, "a number > 0"),
        ("gpus_per_worker", -0.5, r"a number in \[0, 1\], or a whole number"),
        ("gpus_per_worker", 1.5, r"a number in \[0, 1\], or a whole number"),
        ("cpu_workers", -1, "null or an integer >= 0"),
        ("cpu_workers", 2, "0 with gpus_per_worker=0"),
        ("cpu_workers", None, "0 with gpus_per_worker=0"),
        ("server_gpus", -0.1, r"a number in \[0, 1\]"),
        ("server_gpus", 1.5, r"a number in \[0, 1\]"),
        ("turn_seconds", 0, "a number > 0"),
        ("turn_seconds", math.nan, "a number > 0"),
        ("address", "somewhere", "null, host:port or ray://host:port"),
        ("address", "auto", "null, host:port"),
        ("adress", "head:6379", "did you mean address?"),
    ],
)
def test_a_wrong_setting_is_one_line_before_ray_starts(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"'runtime.{key}' is .*; allowed: .*{allowed}"):
        runtime(**{key: value})


def test_a_gpu_for_the_clients_has_to_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'runtime.gpus_per_worker' is 0.0; allowed: a number > 0 where device=cuda"):
        run_on_ray(tiny(tmp_path, "runtime=ray", "device=cuda", methods=["di"]))
    asked = ("runtime=ray", "device=cuda", "runtime.gpus_per_worker=0.5", "runtime.cpu_workers=null")
    with pytest.raises(ConfigError, match="'runtime.cpu_workers' is None; allowed: 0 where device=cuda"):
        run_on_ray(tiny(tmp_path, *asked, methods=["di"]))


def test_the_servers_share_needs_a_machine_of_the_cluster() -> None:
    with pytest.raises(ConfigError, match="'runtime.server_gpus' is 0.5; allowed: 0 with an address of ray://"):
        runtime(address="ray://head:10001", server_gpus=0.5)


def test_threads_of_clients_need_room_on_the_workers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'client_threads' is 2; allowed: at most runtime.cpus_per_worker=0.5, or 1"):
        run_on_ray(tiny(tmp_path, "runtime=ray", "runtime.cpus_per_worker=0.5", "client_threads=2", methods=["di"]))


def test_there_are_as_many_workers_as_there_is_room_for_and_no_more_than_clients() -> None:
    machine = {"CPU": 8.0, "GPU": 2.0}
    assert room(runtime(), machine, 100) == (8, 0)
    assert room(runtime(), machine, 5) == (5, 0)
    assert room(runtime(workers=3), machine, 100) == (3, 0)
    assert room(runtime(cpus_per_worker=0.1), {"CPU": 0.3}, 100) == (3, 0)
    # Of 0.3 of a GPU three fit on one GPU, so six on two; of 0.6, one on each.
    assert room(runtime(gpus_per_worker=0.3), machine, 100) == (6, 0)
    assert room(runtime(gpus_per_worker=0.6), machine, 100) == (2, 0)
    assert room(runtime(gpus_per_worker=2), machine, 100) == (1, 0)
    # The server's 0.5 leave room for two of 0.25 on its GPU, and its 0.1 for three; of 0.6 and of whole ones there is one less.
    assert room(runtime(gpus_per_worker=0.25, server_gpus=0.5), {"CPU": 8.0, "GPU": 1.0}, 100) == (2, 0)
    assert room(runtime(gpus_per_worker=0.25, server_gpus=0.1), machine, 100) == (7, 0)
    assert room(runtime(gpus_per_worker=0.6, server_gpus=0.5), machine, 100) == (1, 0)
    assert room(runtime(gpus_per_worker=1, server_gpus=0.1), machine, 100) == (1, 0)
    assert room(runtime(gpus_per_worker=2, server_gpus=0.1), {"CPU": 8.0, "GPU": 3.0}, 100) == (1, 0)
    for changes, key in (
        ({"gpus_per_worker": 1, "server_gpus": 0.1, "workers": 2}, "workers"),
        ({"workers": 9}, "workers"),
        ({"cpus_per_worker": 9}, "cpus_per_worker"),
        ({"gpus_per_worker": 3}, "gpus_per_worker"),
    ):
        with pytest.raises(ConfigError, match=rf"'runtime\.{key}'.*the cluster has 8 CPUs and 2 GPUs"):
            room(runtime(**changes), machine, 100)


def test_beside_workers_with_a_gpu_there_are_as_many_without_as_there_is_room_for() -> None:
    machine = {"CPU": 8.0, "GPU": 1.0}
    assert room(runtime(gpus_per_worker=0.25, cpu_workers=None), machine, 100) == (4, 4)
    assert room(runtime(gpus_per_worker=0.25, cpu_workers=3), machine, 100) == (4, 3)
    assert room(runtime(gpus_per_worker=0.25, cpu_workers=None, workers=1), machine, 100) == (1, 7)
    assert room(runtime(gpus_per_worker=0.25, cpu_workers=None, cpus_per_worker=2), machine, 100) == (4, 0)
    assert room(runtime(gpus_per_worker=0.25, cpu_workers=None), machine, 6) == (4, 2)
    assert room(runtime(gpus_per_worker=0.25, cpu_workers=4), machine, 3) == (3, 0)
    with pytest.raises(
        ConfigError, match="'runtime.cpu_workers' is 5; allowed: at most 4 beside 4 with a share of a GPU; the cluster has 8 CPUs"
    ):
        room(runtime(gpus_per_worker=0.25, cpu_workers=5), machine, 100)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_one_line(address: str) -> None:
    with (
        pytest.raises(FedimprError, match=f"^starting Ray: there is no Ray cluster .value '{address}'.. Start a cluster"),
        running(address, {}),
    ):
        pass


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No Ray runs here, and signals are handled as by the command."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    numbers = (signal.SIGINT, signal.SIGTERM)
    with listening():
        before = [signal.getsignal(number) for number in numbers]
        yield monkeypatch
        assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_that_ray_loses_while_it_starts_comes_after_it_and_a_second_one_at_once(
    handled: pytest.MonkeyPatch, number: signal.Signals, raised: type[BaseException], times: int
) -> None:
    def init(*words: object, **options: object) -> None:
        with suppress(BaseException) if times == 1 else nullcontext():
            for _ in range(times):
                signal.raise_signal(number)
        assert times == 1, "the second one waits"

    handled.setattr(ray, "init", init)
    with pytest.raises(raised), running(None, {}):
        raise AssertionError("the run went on")


def test_sigterm_that_came_to_rays_own_handler_goes_to_ours(handled: pytest.MonkeyPatch) -> None:
    def init(*words: object, **options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    handled.setattr(ray, "init", init)
    with pytest.raises(Terminated), running(None, {}):
        raise AssertionError("the run went on")


OWN = """
import os, pathlib, ray
from sim import _ray
from sim.environment import QUIET
from sim.on_ray import running
os.environ["CHANGED"] = "before"
starts = [vars(_ray.Node)[name] for name in _ray.SUPERFLUOUS]
with running(None, {"CHANGED": "for workers", "NEW": "for workers", **QUIET}) as left:
    inside = ray.get(ray.remote(lambda: [os.environ.get(name) for name in ("CHANGED", "NEW")]).remote())
    yielding = ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0)
    commands = [path.read_text() for child in pathlib.Path("/proc/self/task").glob("*/children") for pid in child.read_text().split()
                for path in [pathlib.Path("/proc", pid, "cmdline")]]
print(yielding)
print(dict(left), inside, [os.environ.get(name) for name in ("CHANGED", "NEW")])
print(sorted(pathlib.Path(command.split("\\0")[0]).name for command in commands))
print(starts == [vars(_ray.Node)[name] for name in _ray.SUPERFLUOUS])
"""


ROOM = """
import time, numpy, ray
from sim.on_ray import running
places = set()
with running(None, {}):
    for _ in range(6):
        places.add(ray.get(ray.put(numpy.zeros(10 << 20, numpy.uint8))).ctypes.data)
        time.sleep(0.1)
print(len(places))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_model_comes_where_one_was_that_nobody_holds() -> None:
    """Six of 10 MB, a tenth of a second each: Ray's own second would give each a place of its own."""
    ended = subprocess.run([sys.executable, "-c", ROOM], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert int(ended.stdout) <= 2, ended.stderr[-2000:]


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_our_own_gives_workers_their_variables_and_starts_no_process_too_many() -> None:
    ended = subprocess.run([sys.executable, "-c", OWN], cwd=ROOT, capture_output=True, text=True, timeout=120)
    yielding, variables, processes, restored = ended.stdout.splitlines()
    assert yielding == "0", "workers beside two busy processes on two cores would stand still"
    assert variables == "{} ['for workers', 'for workers'] ['before', None]", ended.stderr[-2000:]
    assert processes == "['gcs_server', 'raylet']", "the dashboard, the log monitor and the autoscaler are Pythons"
    assert restored == "True"


def test_a_release_of_ray_without_the_methods_that_start_them_starts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SUPERFLUOUS:
        monkeypatch.delattr(Node, name)
    with without_spare_processes():
        assert not any(hasattr(Node, name) for name in SUPERFLUOUS)


def test_a_module_that_cannot_be_imported_meanwhile_is_told_to_who_imports_it_in_earnest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "broken_meanwhile.py").write_text("raise ValueError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    _import_meanwhile("broken_meanwhile")
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module("broken_meanwhile")
    assert not list(recwarn), "an exception of the thread is nobody's warning"
