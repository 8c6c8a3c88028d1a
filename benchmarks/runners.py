"""What a client's turn costs on each runner, beside Flower's simulation and a plain loop.

    OMP_NUM_THREADS=1 python benchmarks/runners.py
    OMP_NUM_THREADS=1 python benchmarks/runners.py --cases "idle, 1 k" "idle, 60 k"
    OMP_NUM_THREADS=1 python benchmarks/runners.py --tiny

A round is a whole one of FedAvg, ours or Flower's: from the global weights to their average. ``idle`` clients send back what they got;
``LeNet-5`` clients train on 50 images of 28 x 28 in batches of 25, one epoch, and nodes send the sum of theirs; ``turn`` is a local round
without its average: messages, clients, replies. Milliseconds a client on the wall: the median of the rounds after the first, which the
first round has a column of its own for, in seconds from the process's start. Every number is of a process of its own; Ray has two
workers, Flower two actors. Each case is measured beside its opponents, one after another. The limit of LeNet-5 was set where training
alone takes 6 ms: two thirds of ``loop``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

BEGAN = time.perf_counter()

from sim.environment import quiet  # noqa: E402 - the environment must be set before PyTorch, Flower or Ray read it

quiet()

import torch  # noqa: E402
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fedimpr import seeds  # noqa: E402
from fedimpr.data import Dataset, Images  # noqa: E402
from fedimpr.update import Update  # noqa: E402
from sim import client_app, lessons  # noqa: E402
from sim.config import Settings, composed, construct  # noqa: E402
from sim.federation import build_model, strategy_of, warm_model  # noqa: E402
from strategies import Nobody  # noqa: E402
from strategies.records import Instruction, answer_to_record  # noqa: E402

WORKERS, ROUNDS, IMAGES = 2, 16, 50
SIZES = {"1 k": [1000], "60 k": [6000] * 10, "10 MB": [250_000] * 10, "45 MB": [1_125_000] * 10}
LENET = ["dataset=mnist", "model=lenet5", "training.epochs=1", "training.batch_size=25", "minimum=1", "evaluate_clients=false"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Some work, and who does it.

    Attributes:
        limit: milliseconds a client that the first of ``who`` may take; nothing where it is only shown.
        work: ``"idle"``, ``"records"`` (idle, through Flower's own records) or ``"lenet"``.
        size: of the weights of idle clients.
        clients: that take part in a round.
        registered: of which they are drawn; 0: no more.
        per_node: clients that a node hosts.
        sums: whether nodes send sums.
        who: ``local``, ``turn``, ``ray``, ``flower``, ``loop`` (training alone), ``plain ray`` (a task a client).
    """

    limit: float | None
    work: str
    who: tuple[str, ...]
    clients: int = 100
    size: str = "1 k"
    registered: int = 0
    per_node: int = 1
    sums: bool = False


CASES = {
    "idle, 1 k": Case(limit=0.3, work="idle", who=("local", "turn", "flower")),
    "idle, 60 k": Case(limit=0.3, work="idle", size="60 k", who=("local", "turn", "flower")),
    "idle, 1 k, 100 of 10,000": Case(limit=None, work="idle", registered=10_000, who=("local",)),
    "idle, 10 MB, through records": Case(limit=5.0, work="records", size="10 MB", clients=20, who=("local", "turn", "flower")),
    "idle, 10 MB, as tensors": Case(limit=1.0, work="idle", size="10 MB", clients=20, who=("local", "turn")),
    "idle, 10 MB, on Ray": Case(limit=12.0, work="idle", size="10 MB", clients=20, who=("ray", "plain ray")),
    "idle, 10 MB, on Ray, sums of 50": Case(limit=1.0, work="idle", size="10 MB", per_node=50, sums=True, who=("ray",)),
    "idle, 45 MB, on Ray": Case(limit=60.0, work="idle", size="45 MB", clients=10, who=("ray", "flower")),
    **{
        f"LeNet-5, {n} clients": Case(
            limit=None if n == 10 else 4.0, work="lenet", clients=n, per_node=p, sums=True, who=("ray", "local", "loop", "flower")
        )
        for n, p in ((10, 1), (100, 5), (500, 25))
    },
}


def repeated(message: Message, context: Context) -> Message:
    """The weights as they came, as the answer of all clients of the node."""
    asked = Instruction.from_record(message.content)
    settings = client_app.settings_of(asked.settings)
    partitions = client_app.hosted(settings, int(context.node_config["partition-id"]), asked.cohort)
    updates = (Update(partition, asked.round, asked.weights, 1) for partition in partitions)
    return Message(answer_to_record(updates, {}, sums=asked.sums), reply_to=message)


def rewritten(message: Message, context: Context) -> Message:
    """The same, read and written by Flower's own records."""
    asked = Instruction.from_record(message.content)
    place = int(context.node_config["partition-id"])
    record = answer_to_record([Update(place, asked.round, {}, 1)], {}, sums=False)
    record[f"arrays-{place}"] = ArrayRecord(message.content.array_records["arrays"].to_torch_state_dict())
    return Message(record, reply_to=message)


def trained(message: Message, context: Context) -> Message:
    """The library's client on a data set of noise."""
    lessons.shard_of = lambda settings, partition: noise().train.subset(shards().indices[partition])
    return client_app.train(message, context)


def for_flower(message: Message, context: Context) -> Message:
    """What Flower's own FedAvg takes from an idle client, or from one that trains as ours does."""
    arrays = message.content.array_records["arrays"]
    if "settings" in (config := message.content.config_records.get("config", {})):
        settings = client_app.settings_of(str(config["settings"]))
        model = warm_model(settings, None)
        model.load_state_dict(arrays.to_torch_state_dict())
        part = shards().indices[int(context.node_config["partition-id"])]
        torch.set_num_threads(1)
        training(json.dumps(settings.training))(model, noise().train.subset(part), seeds.generator(0, "training"))
        arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


APPS = {"idle": ClientApp(), "records": ClientApp(), "lenet": ClientApp(), "flower": ClientApp()}
for name, train in (("idle", repeated), ("records", rewritten), ("lenet", trained), ("flower", for_flower)):
    APPS[name].train()(train)
    APPS[name].query()(client_app.who)
idle, records, lenet = APPS["idle"], APPS["records"], APPS["lenet"]


@functools.cache
def noise() -> Dataset:
    """Random pixels: how long training takes does not depend on them."""
    generator, count = torch.Generator().manual_seed(0), IMAGES * 500
    pixels = torch.randint(256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Dataset("noise", Images(pixels, torch.randint(10, (count,), generator=generator), tuple("0123456789")), None)  # type: ignore[arg-type]


@functools.cache
def shards() -> Any:
    return SimpleNamespace(indices=torch.arange(len(noise().train)).split(IMAGES))


@functools.cache
def training(text: str) -> Any:
    """Local training from its settings as JSON."""
    return construct(json.loads(text), "training")


class Holder(nn.Module):
    """A model that is only its weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_buffer(name, tensor.clone())


def settings_of(case: Case) -> Settings:
    registered = case.registered or case.clients
    asked = [f"clients={registered}", f"cohort={case.clients}", f"clients_per_node={case.per_node}", f"strategy.partial_sums={case.sums}"]
    return composed([*LENET, "strategy=fedavg", *asked])


def weights_of(case: Case, settings: Settings) -> dict[str, Tensor]:
    if case.work == "lenet":
        return build_model(settings, None).state_dict()
    return {f"w{i}": torch.zeros(n) for i, n in enumerate(SIZES[case.size])}


def ours(case: Case, who: str) -> list[float]:
    """Seconds from the process's start to the end of each round."""
    settings = settings_of(case)
    weights = weights_of(case, settings)
    strategy = strategy_of(settings, Nobody())
    if case.work != "lenet":
        strategy.federation = replace(strategy.federation, build=lambda _: Holder(weights), reference=lambda _: weights)
    ends: list[float] = []
    with ExitStack() as stack:
        if who == "local":
            from sim.grid import LocalGrid

            grid: Any = LocalGrid(APPS[case.work], settings.nodes, {})
        else:
            from sim import on_ray
            from sim.config import call
            from sim.ray_grid import RayGrid

            runtime = call(on_ray.Runtime, composed(["runtime=ray"]).runtime, "runtime")
            size = {"workers": WORKERS, "cpus": 1, "gpus": 0, "turn_seconds": 600.0}
            given = stack.enter_context(on_ray.running(None, on_ray.variables(runtime)))
            grid = stack.enter_context(RayGrid(f"runners:{case.work}", settings.nodes, {}, **size, variables=given, tree=None))
        from strategies.rounds import run_rounds

        after = lambda *_: ends.append(time.perf_counter() - BEGAN)  # noqa: E731
        run_rounds(strategy, grid, weights, first=1, last=ROUNDS, after_round=after)
    return ends


def turn(case: Case, who: str) -> list[float]:
    """What a round costs before anything is summed: the messages go out, the clients run, and the replies come back."""
    from sim.grid import LocalGrid
    from strategies.cohort import by_node, roll_call
    from strategies.federation import instructions

    settings, ends = settings_of(case), list[float]()
    federation, grid = strategy_of(settings, Nobody()).federation, LocalGrid(APPS[case.work], settings.nodes, {})
    weights, nodes = weights_of(case, settings), roll_call(grid, settings.nodes)
    for round in range(1, ROUNDS + 1):
        asked = by_node(federation, nodes, range(case.clients))
        for message_id in grid.push_messages(instructions(federation, asked, weights, round)):
            grid.pull_messages([message_id])
        ends.append(time.perf_counter() - BEGAN)
    return ends


def flowers(case: Case, who: str) -> list[float]:
    """The same of Flower's own FedAvg in Flower's simulation, one SuperNode a client."""
    from flwr.app import ConfigRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    settings, ends = settings_of(case), list[float]()
    weights = weights_of(case, settings)

    class Timed(FedAvg):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            result = super().aggregate_train(server_round, replies)
            ends.append(time.perf_counter() - BEGAN)
            return result

    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Context) -> None:
        while len(list(grid.get_node_ids())) < case.clients:
            time.sleep(0.01)
        config = ConfigRecord({"settings": settings.to_json()} if case.work == "lenet" else {})
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=case.clients, min_available_nodes=case.clients)
        strategy.start(grid, ArrayRecord(weights), num_rounds=ROUNDS, train_config=config)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": WORKERS, "log_to_driver": False}}
    run_simulation(server, APPS["flower"], num_supernodes=case.clients, backend_config=resources)  # type: ignore[arg-type]
    return ends


def loop(case: Case, who: str) -> list[float]:
    """Training alone, one client after another."""
    settings, ends = settings_of(case), list[float]()
    model, local, data = (
        build_model(settings, None),
        training(json.dumps(settings.training)),
        [noise().train.subset(part) for part in shards().indices],
    )
    for _ in range(ROUNDS):
        for part in data[: case.clients]:
            local(model, part, seeds.generator(0, "training"))
        ends.append(time.perf_counter() - BEGAN)
    return ends


def plain_ray(case: Case, who: str) -> list[float]:
    """A task a client that returns its weights; no Flower, no strategy, no supervision."""
    import ray

    ray.init("local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    task = ray.remote(lambda weights: {name: array + 0 for name, array in weights.items()})
    weights, ends = {name: tensor.numpy() for name, tensor in weights_of(case, settings_of(case)).items()}, list[float]()
    for _ in range(ROUNDS):
        shared = ray.put(weights)
        total = {name: array.astype("float64") * 0 for name, array in weights.items()}
        for ref in [task.remote(shared) for _ in range(case.clients)]:
            for name, array in ray.get(ref).items():
                total[name] += array
        ends.append(time.perf_counter() - BEGAN)
    ray.shutdown()
    return ends


RUNNERS = {"local": ours, "turn": turn, "ray": ours, "flower": flowers, "loop": loop, "plain ray": plain_ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--tiny", action="store_true", help="in process and loop only, four clients, written nowhere but to the screen")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        name, who = asked.once
        case = CASES[name]
        if asked.tiny:
            case = replace(case, clients=4, per_node=min(case.per_node, 2))
        print("ends", json.dumps(RUNNERS[who](case, who)), flush=True)
        return
    rows = {}
    for name in asked.cases:
        case = CASES[name]
        who = [one for one in case.who if not asked.tiny or one in ("local", "turn", "loop")]
        rows[name] = {one: seconds(name, one, asked.tiny) for one in who}
        for one, ends in rows[name].items():
            print(f"{name:>34}  {one:>9}  {milliseconds(ends, 4 if asked.tiny else case.clients):8.2f} ms a client", flush=True)
    if asked.tiny:
        return
    from common import write  # workers import this file without its neighbours

    write("runners", "OMP_NUM_THREADS=1 python benchmarks/runners.py", {"rounds": ROUNDS, "ends": rows}, table(rows))


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    text = [f"| work | limit | {' | '.join(RUNNERS)} | first round, s |", "|---" * (len(RUNNERS) + 3) + "|"]
    for name, row in rows.items():
        case = CASES[name]
        cells = [f"{milliseconds(row[who], case.clients):.2f}" if who in row else "" for who in RUNNERS]
        first = ", ".join(f"{who} {ends[0]:.1f}" for who, ends in row.items())
        text.append(f"| {name} | {'' if case.limit is None else case.limit} | {' | '.join(cells)} | {first} |")
    return "\n".join(text)


def milliseconds(ends: list[float], clients: int) -> float:
    """A client's, of the median round after the first."""
    return 1e3 * median(late - early for early, late in zip(ends, ends[1:], strict=False)) / clients


def seconds(name: str, who: str, tiny: bool) -> list[float]:
    """What a process of its own measured."""
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(here), here])}
    command = [sys.executable, __file__, "--once", name, who, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ends ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{name} by {who}: {done.stderr[-2000:]}")
    ends: list[float] = json.loads(lines[-1].removeprefix("ends "))
    return ends


if __name__ == "__main__":
    main()
