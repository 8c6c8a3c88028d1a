"""What a study costs beside its runs, and whether its memory stays flat.

    OMP_NUM_THREADS=1 python benchmarks/study.py
    OMP_NUM_THREADS=1 python benchmarks/study.py --tiny

The first part plays the same runs three times, one after another: as a study, as commands of their own, and as the seconds that the runs
themselves counted. The second is a study of a thousand tiny runs, two side by side: the memory of its own process over time.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write

from sim.html import read

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["training.epochs=10", "distillation.steps=500", "synthesis.di.mining.images=500", "~synthesis.cmi"]
TINY = [
    "~experiment", "clients=3", "dataset.shape=[1,8,8]", "dataset.resize=false", "training.epochs=1", "strategy=fedavg",
    "evaluate_clients=false",
]  # fmt: skip
MANY, EVERY = 1000, 2.0  # runs; seconds between two looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few runs, written nowhere but to the screen")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cost = overhead(Path(folder) / "short", runs=2 if asked.tiny else 8)
        memory = flat(Path(folder) / "many", runs=6 if asked.tiny else MANY)
    text = [
        "| the same runs, one at a time | seconds | above the runs' own |", "|---|---|---|",
        *(f"| {name} | {seconds:.1f} | {seconds / cost['the runs themselves'] - 1:+.1%} |" for name, seconds in cost.items()),
        "", "| runs ended | memory of the study's process, MiB |", "|---|---|", *(f"| {done} | {mib:.0f} |" for done, mib in memory),
    ]  # fmt: skip
    print("\n".join(text))
    if not asked.tiny:
        write("study", "OMP_NUM_THREADS=1 python benchmarks/study.py", {"seconds": cost, "memory": memory}, "\n".join(text))


def overhead(folder: Path, runs: int) -> dict[str, float]:
    """Seconds of the same runs as a study, as commands, and by their own account."""
    seeds = ",".join(map(str, range(runs)))
    begun = time.perf_counter()
    study("study=demo", *SHORT, "partition.alpha=0.5", f"seed={seeds}", "study.workers=1", f"study.output='{folder}'")
    found = {"as a study": time.perf_counter() - begun}
    points = sorted(folder.glob("points/*"))
    own = sum(read(point / "run.json", json.loads)["wall_seconds"] for point in points)
    with (folder / "results.csv").open() as file:
        commands = {row["point"]: row["command"] for row in csv.DictReader(file)}
    begun = time.perf_counter()
    for place, command in enumerate(commands.values()):
        typed = shlex.split(command)
        subprocess.run([sys.executable, *typed[1:], f"output='{folder}-{place}'"], cwd=ROOT, check=True, capture_output=True)
    found["as commands"] = time.perf_counter() - begun
    return {**found, "the runs themselves": own}


def flat(folder: Path, runs: int) -> list[tuple[int, float]]:
    """Memory of a study's process when so many runs had ended."""
    seeds = ",".join(map(str, range(runs)))
    process = study("study=demo", *TINY, "partition.alpha=1", f"seed={seeds}", f"study.output='{folder}'", wait=False)
    seen: list[tuple[int, float]] = []
    while process.poll() is None:
        done = len(list(folder.glob("points/*/report.html")))
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        resident = next((float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)
        if resident and done >= len(seen) * max(1, runs // 10) and done:
            seen.append((done, resident))
        time.sleep(EVERY)
    assert process.returncode == 0
    return seen


def study(*typed: str, wait: bool = True) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "sim.study", *typed], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if wait and process.wait():
        raise RuntimeError(f"a study ended with status {process.returncode}")
    return process


if __name__ == "__main__":
    main()
