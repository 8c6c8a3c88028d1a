"""What a client's turn costs on each runner beside the client's own work.

    OMP_NUM_THREADS=1 python benchmarks/runners.py
    python benchmarks/runners.py --tiny

``idle``: a client that sends the weights back as they came. ``opened``: one that makes tensors of them and packs these again, as every
real one has to. ``LeNet-5``: the client of ``sim/client_app.py``, with 50 images of 28 x 28 in batches of 25, one epoch; ``training`` is
the same without Flower. Milliseconds a client and round, on the wall, from the first message sent to the last reply pulled: the median of
the rounds after the first, and the least in brackets. Ray has two workers; its first round counts from before Ray starts.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from statistics import median
from types import SimpleNamespace

from sim.environment import quiet

quiet()

import torch  # noqa: E402 - the environment must be set before PyTorch, Flower or Ray read it
from flwr.app import ArrayRecord, Context, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from fedimpr import seeds  # noqa: E402
from fedimpr.data import Dataset, Images  # noqa: E402
from sim import client_app, on_ray  # noqa: E402
from sim.config import Settings, call, composed, construct  # noqa: E402
from sim.federation import build_model  # noqa: E402
from sim.grid import LocalGrid  # noqa: E402
from sim.ray_grid import RayGrid  # noqa: E402
from strategies.records import Instruction  # noqa: E402
from strategies.rounds import exchange  # noqa: E402

CLIENTS, COHORTS, WORKERS, ROUNDS = 100, (10, 100, 500), 2, 7
SIZES = {"1 k": [1000], "60 k": [6000] * 10, "2.5 M": [250_000] * 10}
LENET = ["runtime=ray", "dataset=mnist", "model=lenet5", "training.epochs=1", "training.batch_size=25", "minimum=1", "strategy=fedavg"]
IMAGES = 50
APPS = {"idle": ClientApp(), "opened": ClientApp(), "lenet": ClientApp()}
idle, opened, lenet = APPS.values()

Times = dict[str, dict[str, list[float]]]


@idle.train()
def returned(message: Message, context: Context) -> Message:
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)


@opened.train()
def repacked(message: Message, context: Context) -> Message:
    return Message(RecordDict({"arrays": ArrayRecord(message.content.array_records["arrays"].to_torch_state_dict())}), reply_to=message)


@lenet.train()
def trained(message: Message, context: Context) -> Message:
    client_app.dataset_of, client_app.partition_of = lambda settings: DATA, lambda settings: SHARDS
    return client_app.train(message, context)


def noise(count: int) -> Images:
    """Random pixels: how long training takes does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(10, (count,), generator=generator), tuple("0123456789"))


DATA = Dataset("noise", noise(IMAGES * max(COHORTS)), noise(1))
SHARDS = SimpleNamespace(indices=torch.arange(len(DATA.train)).split(IMAGES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="ten clients of a kind, written nowhere but to the screen")
    tiny = parser.parse_args().tiny
    torch.set_num_threads(1)
    sizes, cohorts, clients = (["1 k"], COHORTS[:1], 10) if tiny else (list(SIZES), COHORTS, CLIENTS)
    settings = composed(LENET)
    first, first_of_all = first_round(settings)
    seen: Times = {}
    with on_ray.running(None):
        for name in ("idle", "opened"):
            for size in sizes:
                content = RecordDict({"arrays": ArrayRecord({f"w{i}": torch.zeros(n) for i, n in enumerate(SIZES[size])})})
                seen[f"{name}, {size}, {clients} clients"] = both(name, clients, content, settings)
        for cohort in cohorts:
            asked = Instruction(
                weights=dict(build_model(settings, None).state_dict()),
                round=1,
                settings=settings.to_json(),
                cohort=range(cohort),
                sums=False,
            )
            content = asked.to_record()
            seen[f"LeNet-5, 62 k, {cohort} clients"] = {"training": alone(settings, cohort), **both("lenet", cohort, content, settings)}
    kinds = ("training", "local", "ray")
    rows = ["| client | training | local | Ray, 2 workers |", "|---|---|---|---|"]
    rows += [f"| {name} | {' | '.join(cell(times.get(kind, [])) for kind in kinds)} |" for name, times in seen.items()]
    table = "\n".join(rows) + f"\n\nRay's first round: {first:.1f} s, of which Ray's start took {first_of_all:.1f} s."
    if tiny:
        print(table)
        return
    from common import write  # workers import this file without its neighbours

    facts = {"rounds": ROUNDS, "workers": WORKERS, "milliseconds": seen, "first_round_seconds": first, "ray_start_seconds": first_of_all}
    write("runners", "OMP_NUM_THREADS=1 python benchmarks/runners.py", facts, table)


def cell(times: list[float]) -> str:
    return f"{median(times[1:]):.2f} ({min(times[1:]):.2f})" if times else "-"


def both(name: str, clients: int, content: RecordDict, settings: Settings) -> dict[str, list[float]]:
    return {kind: rounds(kind, name, clients, content, settings) for kind in ("local", "ray")}


def rounds(kind: str, name: str, clients: int, content: RecordDict, settings: Settings) -> list[float]:
    """Milliseconds a client, of each round."""
    with ExitStack() as stack:
        grid = LocalGrid(APPS[name], clients, {}) if kind == "local" else stack.enter_context(ray_grid(name, clients, settings))
        times = []
        for _ in range(ROUNDS):
            messages = [Message(content, node, "train", group_id="1") for node in grid.get_node_ids()]
            start = time.perf_counter()
            replies = list(exchange(grid, messages, [1] * clients, 600.0, lambda *_: None))
            times.append((time.perf_counter() - start) * 1e3 / clients)
            if len(replies) < clients or any(reply.has_error() for reply in replies):
                raise RuntimeError(next((reply.error.reason for reply in replies if reply.has_error()), "too few replies"))
            del replies
    return times


def alone(settings: Settings, clients: int) -> list[float]:
    """The training of all clients and nothing else, in milliseconds a client."""
    training, model, times = construct(settings.training, "training"), build_model(settings, None), []
    shards = [DATA.train.subset(indices) for indices in SHARDS.indices[:clients]]
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for shard in shards:
            training(model, shard, seeds.generator(0, "training"))
        times.append((time.perf_counter() - start) * 1e3 / clients)
    return times


def ray_grid(name: str, clients: int, settings: Settings) -> RayGrid:
    runtime = call(on_ray.Runtime, settings.runtime, "runtime")
    size = {"workers": WORKERS, "cpus": 1, "gpus": 0, "turn_seconds": 600.0}
    return RayGrid(f"runners:{name}", clients, {}, **size, variables=on_ray.variables(runtime), tree=None)


def first_round(settings: Settings) -> tuple[float, float]:
    """Seconds until the first round of a hundred idle clients is over, and of these the start of Ray."""
    start = time.perf_counter()
    with on_ray.running(None):
        up = time.perf_counter() - start
        with ray_grid("idle", CLIENTS, settings) as grid:
            content = RecordDict({"arrays": ArrayRecord({"w": torch.zeros(1000)})})
            messages = [Message(content, node, "train") for node in grid.get_node_ids()]
            list(exchange(grid, messages, [1] * CLIENTS, 600.0, lambda *_: None))
            return time.perf_counter() - start, up


if __name__ == "__main__":
    main()
