"""How near a student starts, and how long it stays ahead: random weights, its teacher's units, and a least-squares fit to its teacher.

    python benchmarks/nearer_start.py --seeds 0 1 2 --workers 2
    python benchmarks/nearer_start.py --tiny

Teachers and students are those of the MNIST pair in ``pairs.py``; images and schedule those of "soft_targeted, Muon", but for as many
images as the short rows have and for the steps. All starts see the same images in the same views. A job is a seed; three take some five
minutes, two of them side by side on two cores. ``--validation`` holds a tenth of the training images out and leaves the test set unread.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from budgets import Run
from common import write
from given import Given
from methods import data_of, listed, spread, teacher_of
from pairs import PAIRS
from torch import Tensor, nn

from fedimpr import models, seeds
from fedimpr.distillation import Mining, mine_and_distil, reconstruct
from fedimpr.evaluation import evaluate
from fedimpr.impressions import Bank, Source

PAIR, METHOD = "mnist", "soft_targeted"
STEPS = [0, 300, 1000, 3000]
FITTED = 4000  # views that the fit looks at
Start = Callable[[nn.Module, nn.Module, Tensor, int], None]
STARTS: dict[str, Start] = {
    "random weights": lambda student, teacher, views, seed: None,
    "random units": lambda student, teacher, views, seed: models.inherit(student, teacher, seeds.generator(seed, "benchmark/units")),
    "least squares": lambda student, teacher, views, seed: reconstruct(student, teacher, views),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="seeds side by side, each with one thread")
    parser.add_argument("--validation", action="store_true", help="evaluate on held-out training images")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, written nowhere but to the screen")
    asked = parser.parse_args()
    asked.pair, asked.device = PAIR, "cpu"
    rows: list[dict] = []
    for seed in asked.seeds:
        teacher_of(PAIRS[PAIR], seed, asked, PAIRS[PAIR].taught(METHOD))
    with multiprocessing.get_context("spawn").Pool(asked.workers) as pool:
        for found in pool.imap_unordered(played, [(asked, seed) for seed in asked.seeds], chunksize=1):
            rows += found
            print(f"seed {found[0]['seed']} in {sum(row['seconds'] for row in found):.0f} s", flush=True)
    if asked.tiny:
        print(table(rows))
        return
    options = f"--seeds {' '.join(map(str, asked.seeds))}{' --validation' * asked.validation}"
    said = f"{PAIRS[PAIR].said} Accuracy in per cent after so many steps, mean over seeds (standard deviation): each seed."
    name = f"nearer_start{'_validation' * asked.validation}"
    write(name, f"python benchmarks/nearer_start.py {options}", {"pair": PAIRS[PAIR].said, "rows": rows}, f"{said}\n\n{table(rows)}")


def played(job: tuple[Any, int]) -> list[dict]:
    """Every start and number of steps with one seed: its rows."""
    asked, seed = job
    torch.set_num_threads(1)
    pair = PAIRS[PAIR]
    run, short = pair.runs[f"{METHOD}, Muon"](tiny=asked.tiny), pair.runs[METHOD](tiny=asked.tiny)
    data, teacher = data_of(pair, asked), teacher_of(pair, seed, asked, pair.taught(METHOD))
    count, source = short.mining.images, seeds.generator(seed, "benchmark/nearer_start")
    images = short.synthesizer.synthesize(teacher, count, source, shape=pair.shape).images
    views = run.distillation.views(images[torch.arange(FITTED) % count], source)
    taught, rows = evaluate(teacher, data.test).accuracy, []
    for name, start in STARTS.items():
        begun = models.build(seed=seeds.derive(seed, "student"), **pair.student)
        then = time.perf_counter()
        start(begun, teacher, views, seed)
        fitting = time.perf_counter() - then
        for steps in STEPS[:2] if asked.tiny else STEPS:
            student = copy.deepcopy(begun)
            then = time.perf_counter()
            if steps:
                learn(teacher, student, images, run, 4 if asked.tiny else steps, seed)
            accuracy = evaluate(student.eval(), data.test).accuracy
            row = {"start": name, "seed": seed, "steps": steps, "accuracy": accuracy, "teacher": taught}
            rows.append({**row, "fitting_seconds": fitting, "seconds": time.perf_counter() - then})
    return rows


def learn(teacher: nn.Module, student: nn.Module, images: Tensor, run: Run, steps: int, seed: int) -> None:
    """The whole schedule in so many steps."""
    mine_and_distil(
        teacher,
        student,
        Given(real=False, images=images),
        mining=Mining(images=len(images), before=0, portions=1, capacity=len(images)),
        distillation=replace(run.distillation, steps=steps),
        bank=Bank(len(images)),
        source=Source(PAIRS[PAIR].teacher["name"], METHOD, 1, seed),
        shape=PAIRS[PAIR].shape,
        generator=seeds.generator(seed, f"benchmark/nearer_start/{steps}"),
    )


def table(rows: list[dict]) -> str:
    """One line a start."""
    counts = sorted({row["steps"] for row in rows})
    text = [f"| start | {' | '.join(f'{steps:,} steps' for steps in counts)} | seconds to start |", "|---" * (2 + len(counts)) + "|"]
    for start in STARTS:
        own = sorted((row for row in rows if row["start"] == start), key=lambda row: row["seed"])
        at = [{row["seed"]: 100 * row["accuracy"] for row in own if row["steps"] == steps} for steps in counts]
        taken = sum(row["fitting_seconds"] for row in own) / len(own)
        text.append(f"| {start} | {' | '.join(f'{spread(list(cell.values()))}: {listed(cell)}' for cell in at)} | {taken:.1f} |")
    teachers = {row["seed"]: 100 * row["teacher"] for row in rows}
    return "\n".join(text) + f"\n\nThe teachers: {spread(list(teachers.values()))}: {listed(teachers)}."


if __name__ == "__main__":
    main()
