"""The runner for many clients or many machines: the server's app in this process, the clients in workers of Ray."""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

# What Ray's daemons say of lost workers and nodes is long, and comes to the screen whatever is asked of them; sim/pool.py says it in one
# line. It has to be set before Ray is imported.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray  # noqa: E402
from flwr.app import Context, RecordDict, UserConfig  # noqa: E402
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayError  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from fedimpr.errors import ConfigError, FedimprError  # noqa: E402
from sim._ray import without_spare_processes  # noqa: E402
from sim.config import Settings, call  # noqa: E402
from sim.environment import QUIET  # noqa: E402
from sim.grid import RUN_ID, SERVER_NODE  # noqa: E402
from sim.pool import START_SECONDS  # noqa: E402
from sim.ray_grid import PROJECT, RayGrid  # noqa: E402
from sim.signals import signals_kept, signals_wait  # noqa: E402

SYSTEM = {
    # Replies up to this size come with the message; LeNet-5 then takes half as long as through the object store.
    "max_direct_call_object_size": 500_000,
    # Models that nobody holds any more make room within this time. Ray's own second leaves room for those of ten rounds in between, and
    # memory that was never used before takes five times as long to write to.
    "free_objects_period_milliseconds": 10,
}
REACH_SECONDS = 5.0  # for a cluster's head to answer


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The settings of ``runtime=ray``.

    Attributes:
        name: ``"ray"``.
        threads: of the server.
        address: of a cluster; ``None`` starts Ray on this machine.
        workers: how many; ``None`` means as many as the cluster has room for, and no more than nodes.
        cpus_per_worker: that Ray sets aside for a worker, > 0.
        gpus_per_worker: the same, >= 0, and a whole number above 1. Workers without see no GPU.
        cpu_workers: how many more without a share of a GPU, beside those with one, >= 0; ``None`` means as many as there is still room for.
        server_gpus: the share of a GPU that is set aside for the server, in [0, 1].
        turn_seconds: a client's turn that takes longer is taken for hung, > 0.
        server_work: who does the synthesis and distillation of several methods: the server, one after another (``"here"``), or the
            ``"workers"`` side by side.
    """

    name: Literal["ray"]
    threads: int
    address: str | None
    workers: int | None
    cpus_per_worker: float
    gpus_per_worker: float
    cpu_workers: int | None
    server_gpus: float
    turn_seconds: float
    server_work: Literal["here", "workers"]

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError("threads", self.threads, "an integer >= 1")
        if self.address is not None and not re.fullmatch(r"(ray://)?[^/\s]+:\d+", self.address):
            # Ray's "auto" is not taken: it may attach to a Ray that another run has started for itself.
            raise ConfigError("address", self.address, "null, host:port or ray://host:port")
        if self.workers is not None and self.workers < 1:
            raise ConfigError("workers", self.workers, "null or an integer >= 1")
        for key in ("cpus_per_worker", "turn_seconds"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(key, getattr(self, key), "a number > 0")
        if self.server_work == "workers" and self.threads > self.cpus_per_worker:
            raise ConfigError("threads", self.threads, f"at most cpus_per_worker={self.cpus_per_worker:g} with server_work=workers")
        if not 0 <= self.gpus_per_worker < math.inf or (self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker)):
            raise ConfigError("gpus_per_worker", self.gpus_per_worker, "a number in [0, 1], or a whole number: Ray gives shares of one GPU")
        if not 0 <= self.server_gpus <= 1:
            raise ConfigError("server_gpus", self.server_gpus, "a number in [0, 1]")
        if self.server_gpus and (self.address or "").startswith("ray://"):
            raise ConfigError("server_gpus", self.server_gpus, "0 with an address of ray://: the server's machine is none of the cluster's")
        if self.cpu_workers is not None and self.cpu_workers < 0:
            raise ConfigError("cpu_workers", self.cpu_workers, "null or an integer >= 0")
        if self.cpu_workers != 0 and not self.gpus_per_worker:
            raise ConfigError("cpu_workers", self.cpu_workers, "0 with gpus_per_worker=0: then all workers are without a GPU")


def run_on_ray(settings: Settings) -> None:
    """Run the federation of ``settings`` with Flower's apps on Ray; where Ray already runs in this process, on that.

    Raises:
        ConfigError: a setting of the runtime is out of range, or the cluster has no room for it.
        FedimprError: the cluster cannot be reached, or what ends a run.
    """
    runtime: Runtime = call(Runtime, settings.runtime, "runtime")
    if settings.device == "cuda" and not runtime.gpus_per_worker:
        raise ConfigError("runtime.gpus_per_worker", runtime.gpus_per_worker, "a number > 0 where device=cuda")
    if settings.device == "cuda" and runtime.cpu_workers != 0:
        raise ConfigError("runtime.cpu_workers", runtime.cpu_workers, "0 where device=cuda")
    if settings.client_threads > max(1, runtime.cpus_per_worker):
        raise ConfigError("client_threads", settings.client_threads, f"at most runtime.cpus_per_worker={runtime.cpus_per_worker:g}, or 1")
    run_config: UserConfig = {"settings": settings.to_json()}
    _import_meanwhile("sim.server_app")
    with running(runtime.address, variables(runtime)) as given, set_aside(runtime.server_gpus):
        workers, cpu_workers = room(runtime, ray.cluster_resources(), settings.nodes)
        grid = RayGrid(
            "sim.client_app:app",
            settings.nodes,
            run_config,
            workers=workers,
            cpus=runtime.cpus_per_worker,
            gpus=runtime.gpus_per_worker,
            cpu_workers=cpu_workers,
            turn_seconds=runtime.turn_seconds,
            variables=given,
            tree=PROJECT if runtime.address is None else None,
        )
        with grid:
            from sim import server_app
            from sim.client_states import states_of

            grid.states = states_of(settings)
            grid.errands = grid if runtime.server_work == "workers" else None
            context = Context(run_id=RUN_ID, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=run_config)
            server_app.app(grid, context)


def room(runtime: Runtime, resources: Mapping[str, float], nodes: int) -> tuple[int, int]:
    """How many workers to start on a cluster with these resources, and how many of ``runtime.cpu_workers`` beside them.

    Raises:
        ConfigError: there is no room for one, or not for as many as are asked for.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    has = f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs"
    most = fit = int(cpus / runtime.cpus_per_worker + 1e-9)
    if share := runtime.gpus_per_worker:
        beside = int((1 - runtime.server_gpus) / share + 1e-9) - int(1 / share + 1e-9)  # on the server's GPU: as many fewer
        most = min(most, int(gpus) * int(1 / share + 1e-9) + beside if share <= 1 else int((gpus - math.ceil(runtime.server_gpus)) / share))
    if most < 1:
        key = "cpus_per_worker" if fit < 1 else "gpus_per_worker"
        raise ConfigError(f"runtime.{key}", getattr(runtime, key), f"what leaves room for one worker; {has}")
    if runtime.workers is not None and runtime.workers > most:
        raise ConfigError("runtime.workers", runtime.workers, f"at most {most} of this size; {has}")
    workers = min(runtime.workers or most, nodes)
    left = fit - workers
    if runtime.cpu_workers is not None and runtime.cpu_workers > left:
        raise ConfigError("runtime.cpu_workers", runtime.cpu_workers, f"at most {left} beside {workers} with a share of a GPU; {has}")
    return workers, min(left if runtime.cpu_workers is None else runtime.cpu_workers, nodes - workers)


def variables(runtime: Runtime) -> dict[str, str]:
    """Environment variables of the workers."""
    found = {**{key: os.environ.get(key, value) for key, value in QUIET.items()}, "OMP_NUM_THREADS": "1"}
    if runtime.address is None:
        found["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return found


class _Holder:
    """Holds a share of a GPU, and does nothing with it."""

    def gpus(self) -> list[str]:
        return [str(one) for one in ray.get_runtime_context().get_accelerator_ids()["GPU"]]


@contextmanager
def set_aside(share: float) -> Iterator[None]:
    """For the length of the block a share of a GPU of this machine is the server's: Ray gives it to nobody, and the server sees no other.

    Raises:
        ConfigError: this machine has no GPU in the cluster, or none with as much left.
    """
    if not share:
        yield
        return
    here = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(_Holder)
    holder = actor.options(num_cpus=0, num_gpus=share, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)).remote()
    try:
        try:
            found = ray.get(holder.gpus.remote(), timeout=START_SECONDS)
        except (ActorUnschedulableError, GetTimeoutError) as error:
            has = next((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["NodeID"] == here), 0.0)
            allowed = f"what the GPUs of the server's machine have left; it has {has:g}"
            raise ConfigError("runtime.server_gpus", share, allowed) from error
        with _set({"CUDA_VISIBLE_DEVICES": ",".join(found)}):
            yield
    finally:
        with suppress(RayError, ValueError):
            ray.kill(holder)


@contextmanager
def running(address: str | None, wanted: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """Ray for the length of the block: a cluster's, or one of our own; what already runs in this process is used and left running.

    Args:
        address: of the cluster; ``None`` starts Ray on this machine.
        wanted: environment variables of the workers.

    Yields:
        Those that each worker has yet to be given. A Ray of our own starts with them, and all its processes inherit them: for a worker that
        wants others, Ray waits until the process is up that prepares environments, then starts one anew, a second or two.

    Raises:
        FedimprError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield wanted
        return
    own: dict[str, Any] = {"include_dashboard": False, "_system_config": SYSTEM}
    try:
        try:
            if address is not None:  # Ray itself would try for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
            with signals_kept(), nullcontext() if address else _set(wanted), without_spare_processes():
                ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else own))
        except OSError as error:
            remedy = "Start a cluster with `ray start --head`, or let Ray start on this machine with runtime.address=null."
            raise FedimprError("there is no Ray cluster", stage="starting Ray", value=address, remedy=remedy) from error
        yield wanted if address else {}
    finally:
        with signals_wait():
            ray.shutdown()


def _import_meanwhile(module: str) -> None:
    """Import a module in a thread: Ray waits for its daemons, and the server for PyTorch, a second or two each. Who imports it in earnest
    waits for the end of it, and is told what fails.

    The environment may be the workers' meanwhile. PyTorch asks for GPUs when it first uses one, and its threads are a setting of the run.
    """

    def bring() -> None:
        with suppress(Exception):
            importlib.import_module(module)

    threading.Thread(target=bring).start()


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, for the processes that start in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
