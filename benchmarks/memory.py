"""How the server's memory grows with the number of clients where only a sum is needed.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
    OMP_NUM_THREADS=1 python benchmarks/memory.py --tiny

One round of FedAvg with ``runtime=local``, and updates of the size of a ResNet-18 (11.2 million weights, 43 MiB), each a model of its own;
clients shift the weights instead of training. Each row is a process of its own; "start" is its peak before the round. Limit: from 10
clients to 1,000, 20 % more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from sim.environment import quiet

quiet()

import torch  # noqa: E402 - the environment must be set before PyTorch and Flower read it
from common import ROOT, write  # noqa: E402
from flwr.app import Context, Message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from fedimpr.update import Update  # noqa: E402
from sim import client_app  # noqa: E402
from sim.config import composed  # noqa: E402
from sim.federation import build_model, strategy_of  # noqa: E402
from sim.grid import LocalGrid  # noqa: E402
from sim.results import peak_memory_mb  # noqa: E402
from strategies import Nobody  # noqa: E402
from strategies.records import Instruction, answer_to_record  # noqa: E402
from strategies.rounds import run_rounds  # noqa: E402

COUNTS = (10, 100, 1000)
BIG = ["dataset=cifar10", "model=resnet18"]

app = ClientApp()
app.query()(client_app.who)


@app.train()
def shifted(message: Message, context: Context) -> Message:
    """The weights, plus the place of this client."""
    asked, place = Instruction.from_record(message.content), int(context.node_config["partition-id"])
    weights = {name: tensor + place for name, tensor in asked.weights.items()}
    return Message(answer_to_record([Update(place, asked.round, weights, 1)], {}, sums=asked.sums), reply_to=message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 and 4 clients, written nowhere but to the screen")
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.clients:
        print(json.dumps(once(asked.clients)))
        return
    rows = [in_process(count) for count in ((2, 4) if asked.tiny else COUNTS)]
    least, most = rows[0], rows[-1]
    table = "| clients | peak memory (MiB) | start (MiB) | milliseconds a client |\n|---|---|---|---|\n" + "".join(
        f"| {row['clients']:,} | {row['peak_mb']:.0f} | {row['start_mb']:.0f} | {row['milliseconds']:.0f} |\n" for row in rows
    )
    table += f"\nMemory, {most['clients']:,} clients over {least['clients']}: {most['peak_mb'] / least['peak_mb']:.3f} (limit 1.20)."
    if asked.tiny:
        print(table)
        return
    write("memory", "OMP_NUM_THREADS=1 python benchmarks/memory.py", {"rows": rows}, table)


def in_process(clients: int) -> dict:
    """:func:`once` in a fresh process."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--clients", str(clients)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def once(clients: int) -> dict:
    """One round in this process."""
    settings = composed(["strategy=fedavg", "evaluate_clients=false", f"clients={clients}", *BIG])
    strategy = strategy_of(settings, Nobody())
    weights = build_model(settings, None).state_dict()
    before, start = peak_memory_mb(), time.perf_counter()
    mean = run_rounds(strategy, LocalGrid(app, clients, {}), weights, first=1, last=1, after_round=lambda *_: None)
    seconds = time.perf_counter() - start
    name = next(iter(weights))
    torch.testing.assert_close(mean[name], weights[name] + (clients - 1) / 2)  # the mean of 0 ... clients - 1
    return {"clients": clients, "peak_mb": peak_memory_mb(), "start_mb": before, "milliseconds": 1e3 * seconds / clients}


if __name__ == "__main__":
    main()
