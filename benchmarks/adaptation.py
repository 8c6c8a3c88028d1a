"""Domain adaptation across clients: every way to adapt, on every target, over several seeds.

    python benchmarks/adaptation.py mnist_shifts --seeds 0 1 2 --workers 2
    python benchmarks/adaptation.py pacs_adaptation mnist_digits
    python benchmarks/adaptation.py mnist_shifts --tiny

Runs ``python -m sim experiment=...`` once a seed and target; all ways share its sources and its impressions, and have the same steps.
Every finished run is a line of ``results/adaptation_<experiment>.jsonl``; a command that was stopped goes on with the runs that are
missing. ``results/adaptation_<experiment>`` is the table over all of them. The gap that a row closes counts from the best single source
(chosen on the test set) to the oracle, seed by seed and target by target. ``--validation`` holds a tenth of the training images out and
leaves the test set unread.
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

from sim.config import composed

TARGETS = {
    "mnist_shifts": ("rotated", "inverted", "blended"),
    "mnist_digits": ("digits", "mnist"),
    "pacs_adaptation": ("photo", "art_painting", "cartoon", "sketch"),
}
BEST, ORACLE = "best single source (by the test set)", "adapted by oracle"
TINY = [
    *("training.epochs=1", "synthesis=[di]", "synthesis.di.synthesizer.steps=2", "synthesis.di.mining.images=20"),
    *(f"+faults.{client}={{_target_:fedimpr.data.faults.OnlySome,images:100}}" for client in range(2)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--targets", nargs="+", help="all by default")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, written nowhere but to the screen")
    resumable(parser)
    asked = parser.parse_args()
    for experiment in asked.experiments:
        targets = asked.targets or TARGETS[experiment]
        jobs = [(target, seed) for seed in asked.seeds for target in targets]
        if asked.tiny:
            print(table([run(experiment, *jobs[0], tiny(experiment, asked))]))
            continue
        options = ["--targets", *asked.targets] if asked.targets else []
        name, command, rows = played("adaptation", experiment, asked, jobs, ("target", "seed"), run, options=options)
        write(name, command, {"runs": rows}, table(rows))


def tiny(experiment: str, asked: argparse.Namespace, *words: str) -> list[str]:
    """Overrides for a few steps of everything."""
    ways = composed([f"experiment={experiment}", *words, *asked.more]).adaptation
    short = [f"adaptation.{way}.steps=2" for way, settings in ways.items() if "steps" in settings]
    return [*TINY, *short, *asked.more, *(["dataset.evaluate=validation"] if asked.validation else [])]


def run(experiment: str, target: str, seed: int, more: list[str]) -> dict:
    """One seed and target, in a process of its own: accuracy and seconds by row, and what the sources were worth."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"experiment={experiment}", f"seed={seed}", f"strategy.targets=[{target}]", f"output={folder}", *more]
        subprocess.run([sys.executable, "-m", "sim", *words], cwd=ROOT, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        read = {name: json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("summary", "run")}
        sources = [line for line in map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines()) if line["stage"] == "source"]
    rows = {row["method"]: {"accuracy": row["accuracy"], "seconds": row["seconds"], "weights": row["weights"]} for row in read["summary"]}
    useful = {line["client"]: {"usefulness": line["usefulness"], "accuracy": line["test_accuracy"]} for line in sources}
    return {"target": target, "seed": seed, "rows": rows, "sources": useful, "wall_seconds": read["run"]["wall_seconds"]}


def table(runs: list[dict]) -> str:
    """One line a row: mean and standard deviation over seeds for each target, the mean over all runs, and the gap closed."""
    targets, names = list(dict.fromkeys(run["target"] for run in runs)), list(runs[0]["rows"])
    columns = ["row", *(f"{target}, % (sd)" for target in targets), "mean, %", "gap closed, % (least)"]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in names:
        cells = [name]
        for target in targets:
            found = [100 * run["rows"][name]["accuracy"] for run in runs if run["target"] == target]
            cells.append(f"{mean(found):.1f} ({stdev(found) if len(found) > 1 else 0.0:.1f})")
        cells.append(f"{mean(100 * run['rows'][name]['accuracy'] for run in runs):.1f}")
        closed = [found for run in runs if (found := gap(run["rows"], name)) is not None]
        cells.append(f"{mean(closed):.0f} ({min(closed):.0f})" if closed else "")
        text.append(f"| {' | '.join(cells)} |")
    wall = sum(run["wall_seconds"] for run in runs)
    return "\n".join(text) + f"\n\n{len(runs)} runs, {wall / 60:.0f} minutes altogether, one after another."


def gap(rows: dict[str, dict], name: str) -> float | None:
    """How much of the way from the best single source to the oracle a row goes, in %; nothing where there is no way to go."""
    least, most = rows[BEST]["accuracy"], rows[ORACLE]["accuracy"]
    return 100 * (rows[name]["accuracy"] - least) / (most - least) if most > least else None


if __name__ == "__main__":
    main()
