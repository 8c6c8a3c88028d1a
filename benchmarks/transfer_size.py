"""Accuracy of the student against the size of its transfer set: data impressions and class impressions.

    python benchmarks/transfer_size.py --seeds 0 1 2 --workers 2
    python benchmarks/transfer_size.py --sizes 1 5 10 --validation
    python benchmarks/transfer_size.py --tiny

Teachers, students and settings are those of the MNIST pair in ``pairs.py``. Sizes are per cent of the training set. For each method and
seed the largest set is mined once, and the smaller ones are random subsets of it, each within the next larger one. Every student takes
the same number of steps. Every finished student is a line of ``results/transfer_size.jsonl``; a command that was stopped goes on with the
missing ones. Another largest size begins anew, since its subsets are of another set. 24,000 images take about 6 minutes on one core to
mine. ``--validation`` holds a tenth of the training images out and leaves the test set unread. Mined sets and teachers wait in
``results/work``: delete them when settings change.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from budgets import Run
from common import RESULTS, write
from given import Given
from methods import current, data_of, fingerprint, lines, listed, spread, teacher_of, work
from pairs import PAIRS

from fedimpr import models, seeds
from fedimpr.distillation import Mining, mine_and_distil
from fedimpr.evaluation import evaluate
from fedimpr.impressions import Bank, Source

PAIR = "mnist"
METHODS = {"di": "data impressions", "ci": "class impressions"}
SIZES = [1.0, 5.0, 10.0, 20.0, 40.0]
TINY = 1000  # the training set's size that a tiny run goes by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, help="per cent of the training set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, each with one thread")
    parser.add_argument("--validation", action="store_true", help="evaluate on held-out training images")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, written nowhere but to the screen")
    asked = parser.parse_args()
    asked.pair, asked.device, asked.sizes = PAIR, "cpu", sorted(asked.sizes)
    if not 0 < asked.sizes[0] <= asked.sizes[-1] <= 100:
        parser.error("--sizes are per cent of the training set, in (0, 100]")
    pair, name = PAIRS[PAIR], f"transfer_size{'_validation' * asked.validation}{'_tiny' * asked.tiny}"
    asked.whole = TINY if asked.tiny else len(data_of(pair, asked).train)
    largest, file = images(asked.sizes[-1], asked), RESULTS / f"{name}.jsonl"
    done = [] if asked.tiny else [row for row in lines(file) if row["mined"] == largest and current(row, pair, asked.tiny)]
    file.write_text("".join(json.dumps(row) + "\n" for row in done))
    finished = {(row["method"], row["seed"], row["percent"]) for row in done}
    for seed in asked.seeds:
        teacher_of(pair, seed, asked, pair.taught("di"))
    points = [(method, seed, percent) for seed in asked.seeds for method in METHODS for percent in asked.sizes]
    missing = [point for point in points if point not in finished]
    with multiprocessing.get_context("spawn").Pool(asked.workers) as pool:
        sets = [(asked, method, seed) for method, seed in dict.fromkeys(point[:2] for point in missing)]
        for said in pool.imap_unordered(mined, sets, chunksize=1):
            print(said, flush=True)
        for row in pool.imap_unordered(distilled, [(asked, *point) for point in missing], chunksize=1):
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{row['method']}  seed {row['seed']}  {row['percent']:g} %  {100 * row['accuracy']:.2f} %", flush=True)
    rows = lines(file)
    if asked.tiny:
        with tempfile.TemporaryDirectory() as folder:
            picture(rows, Path(folder) / "tiny.png")
        for path in [file, *(kept(method, seed, asked) for method in METHODS for seed in asked.seeds)]:
            path.unlink()
        print(table(rows))
        return
    picture(rows, RESULTS / f"{name}.png")
    options = f"--sizes {' '.join(f'{size:g}' for size in asked.sizes)} --seeds {' '.join(map(str, asked.seeds))}"
    command = f"python benchmarks/transfer_size.py {options}{' --validation' * asked.validation}"
    run = pair.runs["di"](tiny=False)
    said = f"{pair.said} Sets are subsets of {largest:,} images a method and seed. Every student takes {run.distillation.steps:,} steps of "
    said += f"{run.distillation.batch_size} images. Accuracy in per cent, mean over seeds (standard deviation): each seed."
    write(name, command, {"pair": pair.said, "rows": rows}, f"{said}\n\n{table(rows)}\n\n![Accuracy against size]({name}.png)")


def images(percent: float, asked: Any) -> int:
    """How many images ``percent`` of the training set are."""
    return max(round(asked.whole * percent / 100), 1)


def kept(method: str, seed: int, asked: Any) -> Path:
    """Where the largest set of a method and seed waits."""
    kind = f"{'-validation' * asked.validation}{'-tiny' * asked.tiny}"
    return work(PAIR) / f"transfer-{method}-{images(asked.sizes[-1], asked)}-{seed}{kind}.pt"


def mined(job: tuple[Any, str, int]) -> str:
    """Mine the largest set, unless it is there; say what it took."""
    asked, method, seed = job
    torch.set_num_threads(1)
    file, pair = kept(method, seed, asked), PAIRS[PAIR]
    if file.exists():
        return f"{method}  seed {seed}  mined before"
    run: Run = pair.runs[method](tiny=asked.tiny)
    start, source = time.perf_counter(), seeds.generator(seed, f"benchmark/transfer/{method}")
    found = run.synthesizer.synthesize(
        teacher_of(pair, seed, asked, pair.taught("di")), images(asked.sizes[-1], asked), source, shape=pair.shape
    )
    seconds = time.perf_counter() - start
    held = {"images": (found.images * 255).round().to(torch.uint8), "seconds": torch.tensor(seconds)}
    part = file.with_suffix(".part")
    torch.save(held, part)
    part.rename(file)  # a command that is stopped here leaves no half of a set
    return f"{method}  seed {seed}  {len(found):,} images in {seconds:.0f} s"


def distilled(job: tuple[Any, str, int, float]) -> dict:
    """A student of one size, its row."""
    asked, method, seed, percent = job
    torch.set_num_threads(1)
    pair, held, count = PAIRS[PAIR], torch.load(kept(method, seed, asked), weights_only=True), images(percent, asked)
    order = torch.randperm(len(held["images"]), generator=seeds.generator(seed, f"benchmark/transfer/{method}/order"))
    chosen = held["images"][order[:count]].float() / 255  # the first of one order, so that sets lie within each other
    data, teacher = data_of(pair, asked), teacher_of(pair, seed, asked, pair.taught("di"))
    student = models.build(seed=seeds.derive(seed, "student"), **pair.student)
    spent = mine_and_distil(
        teacher,
        student,
        Given(real=False, images=chosen),
        mining=Mining(images=count, before=0, portions=1, capacity=count),
        distillation=pair.runs[method](tiny=asked.tiny).distillation,
        bank=Bank(count),
        source=Source(pair.teacher["name"], method, 1, seed),
        shape=pair.shape,
        generator=seeds.generator(seed, f"benchmark/transfer/{method}/{percent}"),
    )
    return {
        "method": method,
        "seed": seed,
        "percent": percent,
        "images": count,
        "settings": fingerprint(pair, method, asked.tiny),
        "mined": len(held["images"]),
        "accuracy": evaluate(student, data.test).accuracy,
        "teacher": evaluate(teacher, data.test).accuracy,
        "mining_seconds": float(held["seconds"]),
        "distilling_seconds": spent.distilling_seconds,
    }


def of(rows: list[dict], method: str) -> dict[float, dict[int, float]]:
    """A method's accuracies in per cent: by size, then by seed."""
    found: dict[float, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: (row["percent"], row["seed"])):
        if row["method"] == method:
            found.setdefault(row["percent"], {})[row["seed"]] = 100 * row["accuracy"]
    return found


def table(rows: list[dict]) -> str:
    """One line a size."""
    counts = {row["percent"]: row["images"] for row in rows}
    teachers = {row["seed"]: 100 * row["teacher"] for row in rows}
    text = [f"| size, % of the training set | images | {' | '.join(METHODS.values())} |", "|---" * (2 + len(METHODS)) + "|"]
    columns = [of(rows, method) for method in METHODS]
    for percent in sorted(counts):
        cells = [f"{spread(list(at.values()))}: {listed(at)}" if (at := column.get(percent)) else "not measured" for column in columns]
        text.append(f"| {percent:g} | {counts[percent]:,} | {' | '.join(cells)} |")
    return "\n".join(text) + f"\n\nThe teachers: {spread(list(teachers.values()))}: {listed(teachers)}."


def picture(rows: list[dict], path: Path) -> None:
    """Accuracy against size: means, and from the least to the largest of all seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for method, label in METHODS.items():
        points = of(rows, method)
        values = [list(by_seed.values()) for by_seed in points.values()]
        (line,) = axis.plot(list(points), [sum(at) / len(at) for at in values], marker="o", label=f"{label} ({method.upper()})")
        axis.fill_between(list(points), [min(at) for at in values], [max(at) for at in values], color=line.get_color(), alpha=0.2, lw=0)
    teachers = {row["seed"]: 100 * row["teacher"] for row in rows}
    axis.axhline(sum(teachers.values()) / len(teachers), color="grey", linestyle="--", label="teacher")
    ticks = sorted({row["percent"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="transfer set, % of the training set's size", ylabel="accuracy of the student, %")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
