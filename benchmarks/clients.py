"""Clients a second on one device: trained one after another or several in one batched computation, by one worker or more.

    OMP_NUM_THREADS=1 python benchmarks/clients.py
    python benchmarks/clients.py --device cuda
    python benchmarks/clients.py --tiny

A client trains on 50 images of noise, one epoch in batches of 25. ``together`` is how many of them one computation trains: 1 is
``fedimpr.training.LocalTraining``, more are the same steps under ``torch.func.vmap``, each client with its own weights, velocities and
clipped gradient. Workers are processes that share the device. The clock runs from when all of them have trained their first batch to when
the last has trained its last client. ``--tiny`` also compares the weights of both ways. Neither Flower nor Ray nor Hydra is needed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import write
from ensemble import clock
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedimpr import models, seeds
from fedimpr.data import Images
from fedimpr.devices import placed
from fedimpr.training import LocalTraining
from fedimpr.views import Views

IMAGES, BATCH = 50, 25
START_SECONDS = 120.0  # for all workers to come up: one that fails must not keep the others waiting
SHAPES = {"lenet5": (1, 28, 28), "cnn128": (3, 32, 32), "resnet18": (3, 32, 32)}
OPTIONS: dict[str, dict[str, Any]] = {"lenet5": {"batch_norm": False}}
# By device: numbers of workers, clients that are trained together, and those that each worker trains, by model.
PLANS = {
    "cpu": ((1, 2), (1, 5), {"lenet5": 100, "cnn128": 20, "resnet18": 5}),
    "cuda": ((1, 2, 4, 8, 16), (1, 10, 50), {"lenet5": 200, "cnn128": 200, "resnet18": 100}),
    "tiny": ((1,), (1, 2), {"lenet5": 4, "cnn128": 2, "resnet18": 2}),
}
AS_THEY_ARE = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)
TRAINING = LocalTraining(
    epochs=1, batch_size=BATCH, lr=0.01, momentum=0.9, momentum_kept=False, weight_decay=0.0, clip=10.0, views=AS_THEY_ARE
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="a few clients, written nowhere but to the screen")
    asked = parser.parse_args()
    workers, together, clients = PLANS["tiny" if asked.tiny else asked.device]
    rows = []
    for name, count, group in itertools.product(SHAPES, workers, together):
        rows.append(
            {
                "model": name,
                "workers": count,
                "together": group,
                "clients_a_second": measured(name, count, group, clients[name], asked.device),
            }
        )
        print(f"{name:>9}  {count} workers, {group} together  {rows[-1]['clients_a_second']:8.2f} clients a second", flush=True)
    if asked.tiny:
        for name in SHAPES:
            print(f"{name:>9}  largest difference of a weight, in turn and together: {difference(name, asked.device):.1e}")
        return
    options = "" if asked.device == "cpu" else " --device cuda"
    name = "clients" if asked.device == "cpu" else "clients_cuda"
    write(name, f"OMP_NUM_THREADS=1 python benchmarks/clients.py{options}", {"rows": rows}, table(rows, together))


def table(rows: Sequence[dict], together: Sequence[int]) -> str:
    """One line a model and number of workers."""
    text = [f"| model | workers | {' | '.join(f'{group} together' for group in together)} |", "|---" * (2 + len(together)) + "|"]
    for (name, count), line in itertools.groupby(rows, key=lambda row: (row["model"], row["workers"])):
        cells = " | ".join(f"{row['clients_a_second']:.4g}" for row in line)
        text.append(f"| {name} | {count} | {cells} |")
    return "Clients a second.\n\n" + "\n".join(text)


def measured(name: str, workers: int, together: int, clients: int, device: str) -> float:
    """Clients a second of all workers, each of which trains as many."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(workers), context.SimpleQueue()
    clients = max(clients // together, 1) * together
    arguments = (name, together, clients, device, barrier, queue)
    processes = [context.Process(target=worker, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{name} with {workers} workers, {together} together: a worker has failed")
    times = [queue.get() for _ in processes]
    return workers * clients / (max(end for _, end in times) - min(start for start, _ in times))


def worker(name: str, together: int, clients: int, device: str, barrier: Any, queue: Any) -> None:
    """Train clients, and tell when that began and ended, by a clock that all processes share."""
    torch.set_num_threads(1)
    at, model = torch.device(device), fresh(name, device)
    weights, data = {key: tensor.clone() for key, tensor in model.state_dict().items()}, shards(name, together)
    trained(model, weights, [one.subset(slice(BATCH)) for one in data])
    clock(at)
    barrier.wait(START_SECONDS)
    start = time.monotonic()
    for _ in range(clients // together):
        trained(model, weights, data)
    clock(at)
    queue.put((start, time.monotonic()))


def fresh(name: str, device: str) -> nn.Module:
    channels = SHAPES[name][0]
    about = {"shape": SHAPES[name], "classes": 10, "mean": [0.5] * channels, "std": [0.3] * channels, "seed": 0}
    return placed(models.build(name, **about, **OPTIONS.get(name, {})), torch.device(device))


def shards(name: str, clients: int) -> list[Images]:
    """Noise, each client's own."""
    source, classes = torch.Generator().manual_seed(0), tuple("0123456789")
    pixels = torch.randint(256, (clients, IMAGES, *SHAPES[name]), generator=source, dtype=torch.uint8)
    return [Images(some, torch.randint(10, (IMAGES,), generator=source), classes) for some in pixels]


def trained(model: nn.Module, weights: dict[str, Tensor], data: Sequence[Images]) -> list[dict[str, Tensor]]:
    """The clients' weights after a turn from the same ones: of one by LocalTraining, of several by the same steps in one computation."""
    sources = [seeds.generator(0, "training", 1, place) for place in range(len(data))]
    if len(data) == 1:
        model.load_state_dict(weights)
        TRAINING(model, data[0], sources[0])
        return [{name: tensor.clone() for name, tensor in model.state_dict().items()}]
    device = next(iter(weights.values())).device
    named = [name for name, _ in model.named_parameters()]
    state = {name: tensor.expand(len(data), *tensor.shape).clone() for name, tensor in weights.items()}
    velocities = {name: torch.zeros_like(state[name]) for name in named}
    model.train()

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = {name: tensor.clone() for name, tensor in buffers.items()}  # batch norm writes into them
        return F.cross_entropy(functional_call(model, {**parameters, **own}, (images,)), labels), own

    step = vmap(grad(loss, has_aux=True), randomness="different")
    for source in sources:
        seeds.draw_seed(source)  # that LocalTraining draws for dropout
    orders = [torch.randperm(len(one), generator=source) for one, source in zip(data, sources, strict=True)]
    for places in zip(*(order.split(BATCH) for order in orders), strict=True):
        batches = [one.batch(at) for one, at in zip(data, places, strict=True)]
        images, labels = (torch.stack(part).to(device) for part in zip(*batches, strict=True))
        buffers = {name: tensor for name, tensor in state.items() if name not in named}
        slopes, buffers = step({name: state[name] for name in named}, buffers, images, labels)
        norms = sum(slope.flatten(1).square().sum(1) for slope in slopes.values()).sqrt()  # one a client
        scale = ((TRAINING.clip or torch.inf) / (norms + 1e-6)).clamp(max=1.0)
        for name, slope in slopes.items():
            velocities[name].mul_(TRAINING.momentum).add_(slope * scale.view(-1, *[1] * (slope.ndim - 1)))
            state[name].sub_(velocities[name], alpha=TRAINING.lr)
        state |= buffers
    return [{name: tensor[place] for name, tensor in state.items()} for place in range(len(data))]


def difference(name: str, device: str) -> float:
    """The largest between weights of three clients, in turn and together."""
    model, data = fresh(name, device), shards(name, 3)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    both = trained(model, weights, data)
    found = 0.0
    for place, together in enumerate(both):
        model.load_state_dict(weights)
        TRAINING(model, data[place], seeds.generator(0, "training", 1, place))
        found = max(found, max(float((tensor - together[key]).abs().max()) for key, tensor in model.state_dict().items()))
    return found


if __name__ == "__main__":
    main()
