"""The benchmark that simulators are compared by: CIFAR-10 over 1,000 clients of 50 images, beside pfl and Flower.

    OMP_NUM_THREADS=1 python benchmarks/cohort_cifar10.py --pfl /path/to/python/with/pfl
    OMP_NUM_THREADS=1 python benchmarks/cohort_cifar10.py --device cuda --rounds 1500 --repeats 1

pfl (Granqvist et al., NeurIPS 2024) runs this task in its own comparison: cohorts of 50, one epoch of five steps of batch 10 at rate 0.1,
the average is the next model, two convolutions with dropout and 1,626,442 parameters (``model=cnn_dropout``). Here for 20 rounds on two
cores: ours with two Ray workers and in process, 125 clients a node that sends the sum of its part of the cohort; pfl in one process with
one thread and with two; Flower's FedAvg in Flower's simulation, 1,000 SuperNodes and two actors, with a plain PyTorch loop as its client.
The accuracy on the test set after the last round stands beside the seconds, which count from the process's start. Three runs of each, or
``--repeats``, in turn; medians. With ``--device cuda`` ours alone, where eight Ray workers share a GPU; pfl's own comparison has 1,500
rounds.

pfl's environment: ``python -m venv it && it/bin/pip install torch==2.13.0 pfl==0.6.0``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

BEGAN = time.perf_counter()
CLIENTS, COHORT, ROUNDS, REPEATS, BATCH, RATE = 1000, 50, 20, 3, 10, 0.1
OURS = [
    "dataset=cifar10", "model=cnn_dropout", "partition=iid", f"clients={CLIENTS}", f"cohort={COHORT}", f"rounds={ROUNDS}", "minimum=1",
    "strategy=fedavg", "evaluate_clients=false", f"evaluate_every={ROUNDS}", "training.epochs=1",
    f"training.batch_size={BATCH}", f"training.lr={RATE}",
    "training.momentum=0", "training.clip=null", "clients_per_node=125", "strategy.partial_sums=true",
]  # fmt: skip
RUNS = {
    "fedimpr, Ray, 2 workers": ("ray", 1),
    "fedimpr, in process": ("local", 1),
    "pfl, 1 thread": ("pfl", 1),
    "pfl, 2 threads": ("pfl", 2),
    "Flower, 2 actors": ("flower", 1),
}
ON_A_GPU = {"fedimpr, Ray, 8 workers": ("ray", 1), "fedimpr, in process": ("local", 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pfl", help="a Python with pfl; without it, its rows say 'not measured'")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of each")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="one round, once, written nowhere but to the screen")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    rounds = 1 if asked.tiny else asked.rounds
    if asked.once:
        how, file = asked.once
        opponents = {"pfl": by_pfl, "flower": by_flower}
        print("took", json.dumps(opponents[how](file, rounds) if how in opponents else ours(how, rounds, asked.device)), flush=True)
        return
    runs = RUNS if asked.device == "cpu" else ON_A_GPU
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "cifar10.npz")
        write_images(file)
        rows: dict[str, list[dict]] = {name: [] for name in runs}
        for _ in range(1 if asked.tiny else asked.repeats):
            for name, (how, threads) in runs.items():
                if how != "pfl" or asked.pfl:
                    rows[name].append(measured(asked, how, threads, file))
                    print(f"{name:>24}  {rows[name][-1]['seconds']:7.1f} s  {100 * rows[name][-1]['accuracy']:.1f} %", flush=True)
    if asked.tiny:
        return
    from common import write

    text = [f"| simulator | seconds, {rounds} rounds | milliseconds a client | accuracy, % |", "|---|---|---|---|"]
    for name, done in rows.items():
        seconds = median(run["seconds"] for run in done) if done else None
        cells = ["not measured", "", ""]
        if seconds is not None:
            cells = [f"{seconds:.1f}", f"{1e3 * seconds / rounds / COHORT:.0f}", f"{100 * median(run['accuracy'] for run in done):.1f}"]
        text.append(f"| {name} | {' | '.join(cells)} |")
    options = "--pfl <python>" if asked.device == "cpu" else "--device cuda"
    options += f" --rounds {rounds}" if rounds != ROUNDS else ""
    name = "cohort_cifar10" + "_cuda" * (asked.device == "cuda") + f"_{rounds}" * (rounds != ROUNDS)
    command = f"OMP_NUM_THREADS=1 python benchmarks/cohort_cifar10.py {options} --repeats {asked.repeats}"
    write(name, command, {"runs": rows}, "\n".join(text))


def measured(asked: argparse.Namespace, how: str, threads: int, file: str) -> dict:
    """What a process of its own took."""
    here = Path(__file__).resolve().parent
    paths = "" if how == "pfl" else f"{here.parent}{os.pathsep}{here}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    command = [asked.pfl if how == "pfl" else sys.executable, __file__, "--once", how, file, *(["--tiny"] if asked.tiny else [])]
    command += ["--rounds", str(asked.rounds), "--device", asked.device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("took ")]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(lines[-1].removeprefix("took "))


def write_images(file: str) -> None:
    """The data set as arrays, for a process that has no fedimpr; normalised as our model does it."""
    import numpy as np

    from sim.config import composed
    from sim.federation import dataset_of

    settings = composed(OURS)
    data = dataset_of(settings)
    mean, std = (np.array(settings.dataset[key], dtype="float32")[:, None, None] for key in ("mean", "std"))
    arrays = {}
    for name, images in (("train", data.train), ("test", data.test)):
        pixels = images.pixels.numpy().astype("float32") / 255
        arrays |= {f"{name}_images": (pixels - mean) / std, f"{name}_labels": images.labels.numpy()}
    np.savez(file, **arrays)


def ours(runtime: str, rounds: int, device: str) -> dict:
    """The command line's run."""
    from sim.config import composed, placed
    from sim.local import run_local
    from sim.on_ray import run_on_ray
    from sim.results import read_rows

    with tempfile.TemporaryDirectory() as folder:
        workers = ["runtime.workers=2"] if device == "cpu" else ["runtime.workers=8", "runtime.gpus_per_worker=0.125"]
        more = [f"output={folder}/run", f"rounds={rounds}", f"evaluate_every={rounds}", f"runtime={runtime}", f"device={device}"]
        more += workers if runtime == "ray" else []
        settings = placed(composed([*OURS, *more]))
        (run_on_ray if runtime == "ray" else run_local)(settings)
        accuracy = next(row.accuracy for row in read_rows(settings.folder / "summary.json") if row.method == "FedAvg")
        return {"seconds": time.perf_counter() - BEGAN, "accuracy": accuracy}


def by_pfl(file: str, rounds: int) -> dict:
    """The same with pfl's own pieces."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel
    from torch import nn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    images, labels, shards = shards_of(file)

    class Net(nn.Sequential):
        def loss(self, x, y, eval=False):  # type: ignore[no-untyped-def]
            self.eval() if eval else self.train()
            return nn.functional.cross_entropy(self(x), y)

        def metrics(self, x, y, eval=False):  # type: ignore[no-untyped-def]
            with torch.no_grad():
                return {"loss": Weighted(float(self.loss(x, y, eval=eval)) * len(y), len(y))}

    net = Net(*layers())
    users = FederatedDataset(
        lambda user: Dataset(raw_data=[images[shards[user]], labels[shards[user]]]), get_user_sampler("random", list(range(CLIENTS)))
    )
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    FederatedAveraging().run(
        NNAlgorithmParams(central_num_iterations=rounds, evaluation_frequency=10_000, train_cohort_size=COHORT, val_cohort_size=0),
        SimulatedBackend(training_data=users, val_data=None),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH),
        send_metrics_to_platform=False,
    )
    return {"accuracy": tested(net, file), "seconds": time.perf_counter() - BEGAN}


def by_flower(file: str, rounds: int) -> dict:
    """The same by Flower's own FedAvg, in Flower's simulation."""
    import torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from torch import nn

    client, server, ended = ClientApp(), ServerApp(), {}

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import cohort_cifar10 as here  # by name, so that an actor reads the images once

        torch.set_num_threads(1)
        images, labels, shards = here.shards_of(file)
        net, places = nn.Sequential(*here.layers()), shards[int(context.node_config["partition-id"])]
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(net.parameters(), RATE)
        for batch in places[torch.randperm(len(places))].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        told = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(places)})}
        return Message(RecordDict(told), reply_to=message)

    @server.main()
    def main(grid, context: Context) -> None:  # type: ignore[no-untyped-def]
        while len(list(grid.get_node_ids())) < CLIENTS:
            time.sleep(0.01)
        strategy = FedAvg(fraction_train=COHORT / CLIENTS, fraction_evaluate=0.0, min_train_nodes=COHORT, min_available_nodes=CLIENTS)
        ended["weights"] = strategy.start(grid, ArrayRecord(nn.Sequential(*layers()).state_dict()), num_rounds=rounds).arrays

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2, "log_to_driver": False}}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)  # type: ignore[arg-type]
    net = nn.Sequential(*layers())
    net.load_state_dict(ended["weights"].to_torch_state_dict())
    return {"accuracy": tested(net, file), "seconds": time.perf_counter() - BEGAN}


@functools.cache
def shards_of(file: str) -> tuple:
    """The training images, their labels, and the places of each client's."""
    import numpy as np
    import torch

    data = np.load(file)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data["train_labels"])))
    return torch.from_numpy(data["train_images"]), torch.from_numpy(data["train_labels"]), order.chunk(CLIENTS)


def layers() -> list:
    """The network's, for the opponents."""
    from torch import nn

    return [
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    ]


def tested(net, file: str) -> float:  # type: ignore[no-untyped-def]
    """The accuracy of an opponent's network."""
    import numpy as np
    import torch

    data = np.load(file)
    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net(part).argmax(1) for part in torch.from_numpy(data["test_images"]).split(500)])
    return float((guesses == torch.from_numpy(data["test_labels"])).float().mean())


if __name__ == "__main__":
    main()
