"""Every method on one teacher and one student: accuracy after the last step, what the impressions are like, and what they cost.

    python benchmarks/methods.py mnist --seeds 0 1 2
    python benchmarks/methods.py cifar10 --seeds 0 1 2 --workers 2
    python benchmarks/methods.py cifar10_wrn --device cuda
    python benchmarks/methods.py mnist --tiny

The pairs stand in ``pairs.py``, every method's settings in ``budgets.py``. A teacher is trained for every seed. Every finished run is a
line of ``results/methods_<pair>.jsonl``, with a fingerprint of its settings; a command that was stopped goes on with the runs that are
missing, runs with settings of the past are made again, and with ``--again`` all that the command names. ``results/methods_<pair>`` is the
table over the last run of every method and seed; rows that are of other settings than now say so. Settings were chosen with
``--validation``, which holds a tenth of the training images out and leaves the test set unread. Neither Flower nor Ray nor Hydra is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from budgets import Run
from common import RESULTS, write
from given import Given
from pairs import COMPARED, PAIRS, Pair, started

from fedimpr import models, seeds
from fedimpr.data import Dataset, load
from fedimpr.devices import accelerated, placed
from fedimpr.distillation import Starts, mine_and_distil
from fedimpr.evaluation import evaluate
from fedimpr.impressions import Bank, Source
from fedimpr.measures import describe

PICTURED = 20  # impressions of a method on the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=sorted(PAIRS))
    parser.add_argument("--methods", nargs="+", help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run on a CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--validation", action="store_true", help="evaluate on held-out training images")
    parser.add_argument("--again", action="store_true", help="make runs that are finished once more")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, written nowhere but to the screen")
    asked = parser.parse_args()
    pair = PAIRS[asked.pair]
    names = asked.methods or list(pair.runs)
    if unknown := [name for name in names if name not in pair.runs]:
        parser.error(f"no method {unknown[0]!r} for {asked.pair}; there are {'; '.join(pair.runs)}")
    file = RESULTS / f"methods_{asked.pair}{'_validation' * asked.validation}{'_tiny' * asked.tiny}.jsonl"
    if asked.tiny:
        file.unlink(missing_ok=True)
    done = set() if asked.again else {(row["method"], row["seed"]) for row in last(lines(file)) if current(row, pair, asked.tiny)}
    for seed in asked.seeds:
        for kind in sorted({pair.taught(name) for name in names}):
            teacher_of(pair, seed, asked, kind)
    jobs = [(asked, name, seed) for seed in asked.seeds for name in names if (name, seed) not in done]
    with multiprocessing.get_context("spawn").Pool(
        asked.workers, maxtasksperchild=1
    ) as pool:  # a process a run: its peak memory is its own
        for row in pool.imap_unordered(run, jobs, chunksize=1):
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{row['method']:>16}  seed {row['seed']}  {100 * row['accuracy']:.2f} %  {row['seconds']:.0f} s", flush=True)
    rows = last(lines(file))
    if asked.tiny:
        file.unlink()
        print(table(pair, rows, tiny=True))
        return
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without the lines that later ones replaced
    picture(asked.pair, pair, [row["method"] for row in rows if row["seed"] == asked.seeds[0]])
    command = f"python benchmarks/methods.py {asked.pair} --seeds {' '.join(map(str, asked.seeds))}"
    name = file.stem
    write(name, command, {"pair": pair.said, "rows": rows}, f"{pair.said}\n\n{table(pair, rows, tiny=False)}")


def run(job: tuple[Any, str, int]) -> dict:
    """One method with one seed: its row."""
    asked, name, seed = job
    torch.set_num_threads(asked.threads if asked.device == "cpu" else 4)
    pair = PAIRS[asked.pair]
    method: Run = pair.runs[name](tiny=asked.tiny)
    settings = fingerprint(pair, name, asked.tiny)
    data, teacher = data_of(pair, asked), teacher_of(pair, seed, asked, pair.taught(name))
    if isinstance(method.synthesizer, Given) and method.synthesizer.real:
        method.synthesizer.images = data.train.batch(torch.arange(min(method.mining.images, len(data.train))))[0]
    device = torch.device(asked.device)
    student = placed(models.build(seed=seeds.derive(seed, "student"), **pair.student), device)
    others = [placed(models.build(seed=seeds.derive(seed, "student"), **pair.student), device) for _ in range(method.starts - 1)]
    if started(name) != name:
        units = seeds.generator(seed, "benchmark/units") if others else None
        for heir in (student, *others):
            models.inherit(heir, teacher, units)
    bank = Bank(method.mining.capacity)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=pair.bfloat16 and asked.device == "cpu", cache_enabled=False)
    start = time.perf_counter()
    with precision:
        spent = mine_and_distil(
            teacher,
            student,
            method.synthesizer,
            mining=method.mining,
            distillation=method.distillation,
            bank=bank,
            source=Source(pair.teacher["name"], name, 1, seed),
            shape=pair.shape,
            generator=seeds.generator(seed, f"benchmark/{started(name)}"),
            starts=Starts(others=others, steps=1 if asked.tiny else COMPARED) if others else None,
        )
    seconds = time.perf_counter() - start
    if seed == asked.seeds[0] and not asked.tiny:
        torch.save(bank.images[torch.randperm(len(bank))[:PICTURED]].cpu(), work(asked.pair) / f"{name}.pt")
    real = data.test.batch(torch.arange(min(2000, len(data.test))))[0].to(device)
    return {
        "method": name,
        "seed": seed,
        "settings": settings,
        "accuracy": evaluate(student, data.test).accuracy,
        "teacher": evaluate(teacher, data.test).accuracy,
        "seconds": seconds,
        "mining_seconds": spent.mining_seconds,
        "distilling_seconds": spent.distilling_seconds,
        "images": method.mining.images,
        "mining_passes": spent.mining_passes,
        "steps": method.distillation.steps,
        "batch": method.distillation.batch_size,
        "measures": describe(teacher, bank.images, bank.labels, real=real, limit=1000, batch=500, neighbours=5),
        "notes": bank.notes,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else f"cpu, {asked.threads} thread{'s' * (asked.threads > 1)}",
    }


def data_of(pair: Pair, asked: Any) -> Dataset:
    """The pair's data set, from ``FEDIMPR_DATA``."""
    cache = os.environ.get("FEDIMPR_CACHE", "~/.cache/fedimpr")
    settings = {**pair.data, "folder": os.environ.get("FEDIMPR_DATA", "data"), "cache": cache, "shape": pair.shape, "resize": False}
    data = load(**settings, evaluate="validation" if asked.validation else "test", validation=0.1, split_seed=0)
    return Dataset(data.name, data.train, data.test.subset(torch.arange(256))) if asked.tiny else data


def teacher_of(pair: Pair, seed: int, asked: Any, kind: str = "teacher") -> torch.nn.Module:
    """The seed's teacher: trained at its first use, then read."""
    mode = f"{'-validation' * asked.validation}{'-tiny' * asked.tiny}"
    file = work(asked.pair) / f"{kind}-{seed}{mode}.pt"
    architecture = pair.plain if kind == "plain" and pair.plain is not None else pair.teacher
    device = torch.device(asked.device)
    teacher = placed(models.build(seed=seeds.derive(seed, "teacher"), **architecture), device)
    if file.exists():
        teacher.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        return teacher.eval()
    data, start = data_of(pair, asked), time.perf_counter()
    source = seeds.generator(seed, "benchmark/teacher")
    train = data.train.subset(torch.arange(512)) if asked.tiny else data.train
    with accelerated(device):
        for stage in pair.training(tiny=asked.tiny):
            stage(teacher, train, source)
    accuracy = evaluate(teacher, data.test).accuracy
    print(f"{kind}, seed {seed}: {100 * accuracy:.2f} %, trained in {time.perf_counter() - start:.0f} s", flush=True)
    torch.save(teacher.state_dict(), file)
    return teacher.eval()


def work(pair: str) -> Path:
    """Where teachers and images wait; not kept in the repository."""
    folder = RESULTS / "work" / pair
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lines(file: Path) -> list[dict]:
    """The rows of a JSON-lines file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last(rows: list[dict]) -> list[dict]:
    """The last row of every method and seed."""
    return list({(row["method"], row["seed"]): row for row in rows}.values())


def fingerprint(pair: Pair, name: str, tiny: bool) -> str:
    """Of all that a run depends on besides its seed and the library: another one, another experiment."""
    taught = pair.plain if pair.taught(name) == "plain" else pair.teacher
    run = pair.runs[name](tiny=tiny)
    said = [pair.shape, taught, pair.student, pair.training(tiny=tiny), pair.bfloat16, run, *([run.starts, COMPARED] * (run.starts > 1))]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:12]


def current(row: dict, pair: Pair, tiny: bool) -> bool:
    """Whether a row is of the settings that its method has now."""
    return row["method"] in pair.runs and row["settings"] == fingerprint(pair, row["method"], tiny)


def table(pair: Pair, rows: list[dict], tiny: bool) -> str:
    """One line a method: means over seeds, those of earlier settings only where no run is of the present ones."""
    columns = ["method", "accuracy, % (sd)", "each seed", "published", "label fidelity", "confidence", "effective number", "coverage"]
    columns += ["Fréchet", "mining s", "ms an image", "passes an image", "distilling s"]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for kind, title in (("teacher", "teacher"), ("plain", "teacher without batch norm")):
        if teachers := {
            row["seed"]: 100 * row["teacher"] for row in rows if row["method"] in pair.runs and pair.taught(row["method"]) == kind
        }:
            text.append(f"| {title} | {spread(list(teachers.values()))} | {listed(teachers)} |" + " |" * (len(columns) - 3))
    for name in pair.runs:
        every = sorted((row for row in rows if row["method"] == name), key=lambda row: row["seed"])
        mine = [row for row in every if current(row, pair, tiny)] or every
        if not mine:
            text.append(f"| {name} | not measured |" + " |" * (len(columns) - 2))
            continue
        accuracy = {row["seed"]: 100 * row["accuracy"] for row in mine}

        def measure(key: str, form: str, mine: list[dict] = mine) -> str:
            found = [row["measures"][key] for row in mine if key in row["measures"]]
            return format(mean(found), form) if found else ""

        keys = (
            ("label_fidelity", ".2f"),
            ("confidence", ".2f"),
            ("effective_number", ".0f"),
            ("coverage", ".2f"),
            ("frechet_distance", ".1f"),
        )
        per_image = median(1000 * row["mining_seconds"] / row["images"] for row in mine)
        title = name if current(mine[0], pair, tiny) else f"{name} (earlier settings)"
        cells = [title, spread(list(accuracy.values())), listed(accuracy), pair.published.get(name, ""), *(measure(*key) for key in keys)]
        cells += [f"{median(row['mining_seconds'] for row in mine):.0f}", f"{per_image:.1f}"]
        cells += [f"{mine[0]['mining_passes'] / mine[0]['images']:.0f}", f"{median(row['distilling_seconds'] for row in mine):.0f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ({stdev(values):.2f})" if len(values) > 1 else f"{values[0]:.2f}"


def listed(values: dict[int, float]) -> str:
    return ", ".join(f"{values[seed]:.2f}" for seed in sorted(values))


def picture(name: str, pair: Pair, methods: list[str]) -> None:
    """``results/methods_<pair>.png``: a row of impressions for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = {m: torch.load(path, weights_only=True) for m in pair.runs if m in methods and (path := work(name) / f"{m}.pt").exists()}
    if not held:
        return
    figure, axes = pyplot.subplots(len(held), 1, figsize=(PICTURED * 0.5, len(held) * 0.72), squeeze=False)
    for axis, (method, images) in zip(axes[:, 0], held.items(), strict=True):
        strip = torch.cat(list(images.expand(-1, 3, -1, -1)), 2).permute(1, 2, 0)
        axis.imshow(strip, interpolation="nearest")
        axis.set_title(method, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(RESULTS / f"methods_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
