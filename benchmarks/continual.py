"""Continual updates: every row of a stream of tasks, over several seeds.

    python benchmarks/continual.py split_mnist --seeds 0 1 2 --workers 2
    python benchmarks/continual.py split_mnist --rows di target --validation

Runs ``python -m sim experiment=... continual=...`` once a seed and row, on one core; all have the same clients and rounds. Every finished
run is a line of ``results/continual_<experiment>.jsonl``; a command that was stopped goes on with the runs that are missing.
``results/continual_<experiment>`` is the table over all of them. ``--validation`` holds a tenth of the training images out and leaves the
test set unread; ``--more`` changes settings, such as the partition, and names the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

from common import ROOT, played, resumable, write

ROWS = ("finetuning", "lwf", "target", "mfcl", "lander", "di", "cmi", "exemplars", "joint")
MEASURES = {
    "last_accuracy_over_images": "last accuracy, %",
    "average_incremental_accuracy_over_images": "average incremental, %",
    "forgetting": "forgetting, points",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    resumable(parser)
    asked = parser.parse_args()
    jobs = [(row, seed) for seed in asked.seeds for row in asked.rows]
    options = ["--rows", *asked.rows] if asked.rows != list(ROWS) else []
    name, command, runs = played("continual", asked.experiment, asked, jobs, ("row", "seed"), play, options=options)
    write(name, command, {"runs": runs}, table(runs))


def play(experiment: str, row: str, seed: int, more: list[str]) -> dict:
    """One seed and row, in a process of its own: the measures, and the accuracy matrix of the model that goes on."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"experiment={experiment}", f"continual={row}", f"seed={seed}", f"output={folder}", "runtime.threads=1", *more]
        subprocess.run([sys.executable, "-m", "sim", *words], cwd=ROOT, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        methods = json.loads((Path(folder) / "continual.json").read_text())["methods"]
        told = list(methods.values())[-1]
        wall = json.loads((Path(folder) / "run.json").read_text())["wall_seconds"]
    return {"row": row, "seed": seed, **told, "wall_seconds": wall}


def table(runs: list[dict]) -> str:
    """One line a row: mean and standard deviation over seeds, the share of joint training's last accuracy, and the longest run."""
    joint = {run["seed"]: run["measures"]["last_accuracy_over_images"] for run in runs if run["row"] == "joint"}
    columns = ["row", "seeds", *(f"{name} (sd)" for name in MEASURES.values()), "of joint (least)", "longest run, min"]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in sorted({run["row"] for run in runs}, key=ROWS.index):
        own = [run for run in runs if run["row"] == row]
        cells = [row, str(len(own))]
        for measure in MEASURES:
            values = [100 * run["measures"][measure] for run in own]
            cells.append(f"{mean(values):.1f} ({stdev(values) if len(values) > 1 else 0.0:.1f})")
        ratios = [run["measures"]["last_accuracy_over_images"] / joint[run["seed"]] for run in own if run["seed"] in joint]
        cells.append(f"{mean(ratios):.3f} ({min(ratios):.3f})" if ratios else "")
        cells.append(f"{max(run['wall_seconds'] for run in own) / 60:.1f}")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
