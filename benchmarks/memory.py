"""How the server's memory grows with the number of clients: where only a sum is needed, and where every client's model is.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
    OMP_NUM_THREADS=1 python benchmarks/memory.py --tiny

One round with ``runtime=local``, and updates of the size of a ResNet-18 (11.2 million weights, 43 MiB), each a model of its own; clients
shift the weights instead of training. Each row is a process of its own.

* FedAvg. "Start" is the process's peak before the round. Limit: from 10 clients to 1,000, 20 % more.
* Data-free distillation with as little mining as there is: two impressions, one step each of mining and of distilling. Once with all
  updates in memory, once with all in files. "Anonymous" is memory that nobody but the process can give back: its largest size until the
  last update is there and in the ensemble, and in the whole round. "Of files" are pages that are read from files, the program's own
  among them, and that the kernel takes back when memory is short. Limit: anonymous memory with files, from the fewest clients to the
  most, 20 % more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from sim.environment import quiet

quiet()

import torch  # noqa: E402 - the environment must be set before PyTorch and Flower read it
from common import ROOT, write  # noqa: E402
from flwr.app import Context, Message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from fedimpr.update import Update  # noqa: E402
from sim import client_app  # noqa: E402
from sim.checkpoint import States  # noqa: E402
from sim.config import composed  # noqa: E402
from sim.federation import build_model, strategy_of  # noqa: E402
from sim.grid import LocalGrid  # noqa: E402
from sim.results import peak_memory_mb  # noqa: E402
from strategies import Nobody  # noqa: E402
from strategies.records import Instruction, answer_to_record  # noqa: E402
from strategies.rounds import run_rounds  # noqa: E402

COUNTS = (10, 100, 1000)
ENSEMBLES = (10, 40)
SHIFT = 1e-4  # small enough that forty shifted networks still compute
BIG = ["dataset=cifar10", "model=resnet18", "evaluate_clients=false"]
LITTLE = ["mining.images=2", "mining.portions=1", "mining.capacity=2", "synthesizer.steps=1", "synthesizer.batch_size=2"]
FEW = ["synthesis=[di]", *(f"synthesis.di.{one}" for one in LITTLE), "distillation.steps=1", "distillation.batch_size=2"]

app = ClientApp()
app.query()(client_app.who)


@app.train()
def shifted(message: Message, context: Context) -> Message:
    """The weights, shifted by a little that grows with the place of this client."""
    asked, place = Instruction.from_record(message.content), int(context.node_config["partition-id"])
    weights = {name: tensor + place * SHIFT if tensor.is_floating_point() else tensor for name, tensor in asked.weights.items()}
    return Message(answer_to_record([Update(place, asked.round, weights, 1)], {}, sums=asked.sums), reply_to=message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 and 4 clients, written nowhere but to the screen")
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ensemble", choices=WHERE, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.clients:
        print(json.dumps(ensemble(asked.clients, asked.ensemble) if asked.ensemble else once(asked.clients)))
        return
    rows = [in_process(count) for count in ((2, 4) if asked.tiny else COUNTS)]
    members = [in_process(count, where) for where in WHERE for count in ((2, 4) if asked.tiny else ENSEMBLES)]
    least, most = rows[0], rows[-1]
    table = "| clients | peak memory (MiB) | start (MiB) | milliseconds a client |\n|---|---|---|---|\n" + "".join(
        f"| {row['clients']:,} | {row['peak_mb']:.0f} | {row['start_mb']:.0f} | {row['milliseconds']:.0f} |\n" for row in rows
    )
    table += f"\nMemory, {most['clients']:,} clients over {least['clients']}: {most['peak_mb'] / least['peak_mb']:.3f} (limit 1.20)."
    table += "\n\n| one model per client | clients | anonymous, all there (MiB) | anonymous, peak | of files, peak | seconds |\n"
    table += "|---|---|---|---|---|---|\n"
    table += "".join(
        f"| {row['where']} | {row['clients']} | {row['there_mb']:.0f} | {row['anonymous_mb']:.0f} | {row['files_mb']:.0f} "
        f"| {row['seconds']:.0f} |\n"
        for row in members
    )
    grown = members[-1]["anonymous_mb"] / members[-2]["anonymous_mb"]
    table += f"\nAnonymous memory with files, {members[-1]['clients']} clients over {members[-2]['clients']}: {grown:.3f} (limit 1.20)."
    if asked.tiny:
        print(table)
        return
    write("memory", "OMP_NUM_THREADS=1 python benchmarks/memory.py", {"rows": rows, "ensembles": members}, table)


def in_process(clients: int, where: str | None = None) -> dict:
    """:func:`once`, or :func:`ensemble`, in a fresh process."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--clients", str(clients), *(["--ensemble", where] if where else [])]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def once(clients: int) -> dict:
    """One round in this process."""
    settings = composed(["strategy=fedavg", f"clients={clients}", *BIG])
    strategy = strategy_of(settings, Nobody())
    weights = build_model(settings, None).state_dict()
    before, start = peak_memory_mb(), time.perf_counter()
    mean = run_rounds(strategy, LocalGrid(app, clients, {}), weights, first=1, last=1, after_round=lambda *_: None)
    seconds = time.perf_counter() - start
    name = next(iter(weights))
    torch.testing.assert_close(mean[name], weights[name] + SHIFT * (clients - 1) / 2)  # the mean of 0 ... clients - 1
    return {"clients": clients, "peak_mb": peak_memory_mb(), "start_mb": before, "milliseconds": 1e3 * seconds / clients}


WHERE = {"in memory": 1e9, "in files": 0.0}  # strategy.updates_in_memory_mb


class Sampled(Nobody):
    """Looks at this process's memory every 20 ms, and when all updates are there. Kinds as Linux counts them, in MiB."""

    def __init__(self) -> None:
        self.most, self.there = {"RssAnon": 0.0, "RssFile": 0.0}, 0.0
        threading.Thread(target=self.sample, daemon=True).start()

    def sample(self) -> None:
        while True:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        now = {words[0].rstrip(":"): int(words[1]) / 2**10 for words in lines if words[0].startswith("Rss")}
        self.most = {kind: max(most, now[kind]) for kind, most in self.most.items()}

    def answered(self, *_: object) -> None:
        self.look()
        self.there = self.most["RssAnon"]


def ensemble(clients: int, where: str) -> dict:
    """One round of data-free distillation in this process."""
    settings = composed([f"clients={clients}", f"strategy.updates_in_memory_mb={WHERE[where]}", *BIG, *FEW])
    watch, start = Sampled(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        strategy = strategy_of(settings, watch, States(Path(folder), 1e9))
        weights = build_model(settings, None).state_dict()
        run_rounds(strategy, LocalGrid(app, clients, {}), weights, first=1, last=1, after_round=lambda *_: None)
    memory = {"there_mb": watch.there, "anonymous_mb": watch.most["RssAnon"], "files_mb": watch.most["RssFile"]}
    return {"clients": clients, "where": where, **memory, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
