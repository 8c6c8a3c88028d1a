"""One-shot data-free federated learning: the table of an experiment over several seeds.

    python benchmarks/one_shot.py demo mnist --seeds 0 1 2

Runs ``python -m sim`` once per experiment and seed, one after another, and writes ``results/one_shot_<experiment>``, with
the first seed's impressions as a picture. Without arguments: the
demo, and MNIST where FEDIMPR_DATA names its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median, stdev

from common import RESULTS, ROOT, write

LIMIT = {"ratio": 0.90, "points_above_fedavg": 0.15}  # what both students of the demo must reach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=["demo"] + (["mnist"] if os.environ.get("FEDIMPR_DATA") else []))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    for experiment in arguments.experiments:
        runs = [run(experiment, seed, picture=seed == arguments.seeds[0]) for seed in arguments.seeds]
        command = f"python benchmarks/one_shot.py {experiment} --seeds {' '.join(map(str, arguments.seeds))}"
        write(f"one_shot_{experiment}", command, {"seeds": arguments.seeds, "limits": LIMIT, "runs": runs}, table(runs))


def run(experiment: str, seed: int, *, picture: bool) -> dict:
    """The rows and facts of one run, in a process of its own; its impressions are kept as a picture if asked."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sim", f"experiment={experiment}", f"seed={seed}", f"output={folder}"]
        subprocess.run(command, cwd=ROOT, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        if picture:
            shutil.copyfile(Path(folder) / "impressions.png", RESULTS / f"one_shot_{experiment}.png")
        read = {name: json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("summary", "run", "manifest")}
    kept = {key: read["manifest"][key] for key in ("recipe", "sha256", "sizes")}
    return {"seed": seed, "rows": read["summary"], "run": read["run"], "partition": kept}


def table(runs: list[dict]) -> str:
    """Mean and standard deviation over seeds, and each seed's accuracy."""
    columns = ["method", "accuracy, % (sd)", "ratio (sd)", "above FedAvg, points", "each seed, % (ratio)", "seconds (median)"]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    lines = []
    for place, first in enumerate(runs[0]["rows"]):
        rows = [run["rows"][place] for run in runs]
        fedavg = [next(row["accuracy"] for row in run["rows"] if "FedAvg" in row["method"]) for run in runs]
        accuracy, ratio = [100 * row["accuracy"] for row in rows], [row["ratio"] for row in rows]
        above = min(row["accuracy"] - average for row, average in zip(rows, fedavg, strict=True))
        each = ", ".join(f"{a:.1f} ({r:.3f})" for a, r in zip(accuracy, ratio, strict=True))
        lines.append(
            f"| {first['method']} | {mean(accuracy):.1f} ({spread(accuracy):.1f}) | {mean(ratio):.3f} ({spread(ratio):.3f}) "
            f"| at least {100 * above:.1f} | {each} | {median(row['seconds'] for row in rows):.1f} |"
        )
    memory, wall = (max(run["run"][key] for run in runs) for key in ("peak_memory_mb", "wall_seconds"))
    costs = [row for row in runs[0]["rows"] if row["images"]]
    spent = "; ".join(
        f"{r['method']}: {r['images']} images, {r['teacher_passes']} images through the teacher, {r['steps']} steps x {r['batch']}"
        for r in costs
    )
    return head + "\n".join(lines) + f"\n\nCosts a run: {spent}. Largest wall time {wall:.0f} s, largest peak memory {memory:.0f} MiB."


def spread(values: list[float]) -> float:
    """Standard deviation; zero for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
