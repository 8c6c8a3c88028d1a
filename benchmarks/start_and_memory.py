"""How soon the first client trains, and what a hundred clients cost in memory beside ten with the same data.

    python benchmarks/start_and_memory.py

Each run is a process of its own; imports are done before the clock starts. Limits: 1 s, and 20 % more memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from statistics import median

from common import ROOT, write

REPEATS = 3
# The demo's whole way, with fewer steps: memory does not grow with them.
OVERRIDES = [
    "experiment=demo", "synthesis.di.synthesizer.steps=5", "synthesis.cmi.synthesizer.steps=5", "synthesis.cmi.mining.images=128",
    "synthesis.cmi.mining.portions=2", "distillation.steps=20", "training.epochs=2", "minimum=5",
]  # fmt: skip


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(once(int(sys.argv[1]))))
        return
    seen = {clients: [in_process(clients) for _ in range(REPEATS)] for clients in (10, 100)}
    start = {clients: median(run["first_client_seconds"] for run in runs) for clients, runs in seen.items()}
    memory = {clients: median(run["peak_memory_mb"] for run in runs) for clients, runs in seen.items()}
    table = (
        f"| clients | first client trains after (s) | peak memory (MiB) |\n|---|---|---|\n"
        f"| 10 | {start[10]:.2f} | {memory[10]:.0f} |\n| 100 | {start[100]:.2f} | {memory[100]:.0f} |\n\n"
        f"Memory, 100 clients over 10: {memory[100] / memory[10]:.3f} (limit 1.20). Medians of {REPEATS} processes."
    )
    write("start_and_memory", "python benchmarks/start_and_memory.py", {"runs": seen}, table)


def in_process(clients: int) -> dict:
    """:func:`once` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, str(clients)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def once(clients: int) -> dict:
    """Run in this process."""
    import time

    import flwr_datasets  # noqa: F401 - imports count apart, also those that wait for their first use

    from sim import client_app, local
    from sim.config import composed
    from sim.results import peak_memory_mb

    began: list[float] = []
    training = client_app.LocalTraining.__call__

    def watched(*arguments):
        began.append(time.perf_counter())
        return training(*arguments)

    client_app.LocalTraining.__call__ = watched
    with tempfile.TemporaryDirectory() as folder:
        settings = composed([*OVERRIDES, f"clients={clients}", f"output={folder}"])
        start = time.perf_counter()
        local.run_local(settings)
    return {"clients": clients, "first_client_seconds": began[0] - start, "peak_memory_mb": peak_memory_mb()}


if __name__ == "__main__":
    main()
