"""How soon the first round of a run is over, as its user waits for it: from the start of the command.

    python benchmarks/first_round.py

``python -m sim`` on each runner: 100 clients of 1,200, each with 50 images of MNIST, LeNet-5, batches of 25, one epoch, sums on the nodes,
two workers. Beside it as many such clients in Flower's own simulation, without our strategy, reports and data (see ``runners.py``).
Seconds, medians of processes that take turns. The clock of a run, by which its ``metrics.jsonl`` goes, starts after most imports. Limits: 1
s in process by that clock, 8 s on Ray by the wall's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import ROOT, write

REPEATS = 5
LOOK_SECONDS = 0.01
OVERRIDES = [
    "dataset=mnist", "model=lenet5", "strategy=fedavg", "strategy.partial_sums=true", "clients=1200", "cohort=100", "clients_per_node=50",
    "training.epochs=1", "training.batch_size=25", "evaluate_clients=false", "rounds=2",
]  # fmt: skip
RUNNERS = {"local": [], "ray": ["runtime.workers=2"], "flower": []}
OPPONENT = "Flower's simulation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="in process only, once, written nowhere but to the screen")
    if parser.parse_args().tiny:
        print(table({"local": [ours("local")]}))
        return
    seen: dict[str, list[tuple[float, float | None]]] = {who: [] for who in (*RUNNERS, OPPONENT)}
    for repeat in range(REPEATS):
        for who, ends in seen.items():
            ends.append(opponents() if who == OPPONENT else ours(who))
            print(f"{repeat + 1} of {REPEATS}  {who:>20}  {ends[-1][0]:6.2f} s", flush=True)
    write("first_round", "python benchmarks/first_round.py", {"seconds": seen}, table(seen))


def ours(runtime: str) -> tuple[float, float]:
    """Seconds until the first round of a run is over, from the command's start and by the run's own clock."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "sim", *OVERRIDES, f"runtime={runtime}", *RUNNERS[runtime], f"output={output}"]
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
            while run.poll() is None and not rounds(output / "metrics.jsonl"):
                time.sleep(LOOK_SECONDS)
            seconds = time.perf_counter() - start
            _, said = run.communicate()
        if run.returncode:
            raise RuntimeError(f"runtime={runtime}: {said[-2000:]}")
        return seconds, rounds(output / "metrics.jsonl")[0]


def rounds(file: Path) -> list[float]:
    """When each round was over, by the run's clock."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line["time"] for line in map(json.loads, lines) if line["stage"] == "round"]


def opponents() -> tuple[float, None]:
    """The same of Flower's own strategy, clients and simulation."""
    command = [sys.executable, str(ROOT / "benchmarks" / "runners.py"), "--once", "LeNet-5, 100 clients", "flower"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("ends "))
    return json.loads(line.removeprefix("ends "))[0], None


def table(seen: dict[str, list]) -> str:
    text = ["| runner | first round over after (s) | soonest and latest | by the run's clock (s) |", "|---|---|---|---|"]
    for who, ends in seen.items():
        whole, clock = [end for end, _ in ends], [end for _, end in ends if end is not None]
        text.append(f"| {who} | {median(whole):.2f} | {min(whole):.2f}, {max(whole):.2f} | {f'{median(clock):.2f}' if clock else ''} |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
