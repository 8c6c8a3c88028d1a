"""A study's folder as the runner would leave it, with made-up numbers: real runs take minutes."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from sklearn.datasets import load_digits

from sim.plots import draw_impressions, draw_partition
from sim.results import Sheet

METHODS = {
    "one-shot FedAvg": -0.18,
    "uniform ensemble": 0.0,
    "class-aware ensemble": 0.03,
    "student by DI": -0.035,
    "student by CMI": -0.02,
}
COLUMNS = ("status", "cause", "method", "accuracy", "ratio", "images", "steps", "teacher_passes", "clients", "excluded")
COLUMNS += ("bytes_down", "bytes_up", "simulated_seconds", "weights", "config_hash", "command")
FAILED = "client 3, round 1, training: loss is nan (value nan). Lower the learning rate."
SIZE = 61_706 * 4  # bytes of LeNet-5's weights


def made_up_study(
    folder: Path,
    axes: Mapping[str, Sequence[object]],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    methods: Mapping[str, float] = METHODS,
    rounds: int = 1,
    statuses: Mapping[int, str] | None = None,
    baseline: str | None = "uniform ensemble",
    pictures: bool = True,
    clients: int = 10,
) -> Path:
    """Write the folder; the same arguments give the same bytes.

    Args:
        axes: key to values; ``partition.alpha`` moves accuracies.
        methods: name to how much it is better than the uniform ensemble.
        statuses: of the points that are not finished, by their place.
        pictures: whether points hold pictures and reports.
    """
    keys, points = list(axes), list(itertools.product(*axes.values(), seeds))
    folder.mkdir(parents=True, exist_ok=True)
    study = {
        "name": "one_shot_mnist",
        "question": "How do one-shot methods fare as clients grow unlike each other?",
        "base": ["experiment=mnist"],
        "axes": {key: list(values) for key, values in axes.items()},
        "seeds": list(seeds),
        "compare": [],
        "baseline": baseline,
        "command": "python -m sim.study study=one_shot_mnist",
    }
    (folder / "study.json").write_text(json.dumps(study))
    rows, costs = [], []
    for place, values in enumerate(points):
        setting, seed = values[:-1], values[-1]
        random, point = np.random.default_rng([place, 7]), f"{place:04d}"
        status = (statuses or {}).get(place, "finished")
        command = "python -m sim experiment=mnist " + " ".join(f"{key}={value}" for key, value in zip(keys, setting, strict=True))
        common = [f"{command} seed={seed} output=points/{point}", f"{place:064x}"]
        if status != "finished":
            cause = FAILED if status == "failed" else "stopped by signal 15" if status == "interrupted" else ""
            rows.append([point, *setting, seed, status, cause, *[""] * 12, common[1], common[0]])
            continue
        alpha = float(dict(zip(keys, setting, strict=True)).get("partition.alpha", 0.1))
        ceiling = 0.93 + 0.05 * np.log10(alpha) + random.normal(0, 0.012)
        for method, better in methods.items():
            one_shot = better * (1.3 - 0.4 * np.log10(alpha / 0.05)) + random.normal(0, 0.008 + 0.15 * abs(better))
            accuracy = float(np.clip(ceiling + one_shot * 0.8 ** (rounds - 1), 0, 1))
            mined = [2000, 4000, 412_000] if method.startswith("student") else ["", "", ""]
            traffic = [10 * SIZE * rounds, 10 * SIZE * rounds, round(94.2 * rounds, 1) if rounds > 1 else ""]
            rows.append(
                [point, *setting, seed, status, "", method, round(accuracy, 6), round(accuracy / ceiling, 6), *mined, 10, 0, *traffic]
                + [f"{round(1000 * abs(better)) * 10_000 + place:064x}", common[1], common[0]]
            )
            seconds = 61.2 + place % 7 if method.startswith("student") else 0.02
            costs.append([point, method, round(seconds, 2), round(seconds * 0.6, 2) if seconds > 1 else "", 131.5 + place % 5, 612.4])
        _point(folder / "points" / point, dict(zip(keys, setting, strict=True)), int(seed), alpha, clients, common)
        _metrics(folder / "points" / point, rows[-len(methods) :], keys, rounds)
        if pictures:
            _pictures(folder, point, place)
    _table(folder / "results.csv", ["point", *keys, "seed", *COLUMNS], rows)
    _table(folder / "costs.csv", ["point", "method", "seconds", "mining_seconds", "wall_seconds", "peak_memory_mb"], costs)
    return folder


def _table(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def _point(folder: Path, values: Mapping[str, object], seed: int, alpha: float, clients: int, common: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    config: dict[str, object] = {
        "name": "mnist",
        "seed": seed,
        "clients": clients,
        "output": str(folder.name),
        "dataset": {"name": "mnist"},
    }
    for key, value in values.items():
        node, *rest = key.split(".")
        config[node] = {rest[0]: value} if rest else value
    config["training"] = {"epochs": 10, "batch_size": 64, "lr": 0.02, "views": {"shift": 0.0, "scale": [1.0, 1.0]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    random = np.random.default_rng([seed, round(1000 * alpha)])
    counts = np.round(random.dirichlet([alpha] * 10, clients) * 6000).astype(int).tolist()
    manifest = {"dataset": "mnist", "recipe": "dirichlet_per_client", "parameters": {"alpha": alpha}, "clients": clients, "seed": seed}
    names = [str(k) for k in range(10)]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "counts": counts, "classes": names, "sha256": f"{seed}{alpha}"}))
    (folder / "run.json").write_text(json.dumps({"status": "finished", "seed": seed, "config_hash": common[1]}))


def _metrics(folder: Path, rows: Sequence[Sequence[object]], keys: Sequence[str], rounds: int) -> None:
    lines = [{"time": 0.5, "stage": "client", "round": 1, "client": 0, "loss": 0.4}]
    for number in range(1, rounds + 1):
        if rounds > 1:
            traffic = {"bytes_down": 10 * SIZE, "bytes_up": 10 * SIZE, "simulated_seconds": 94.2 * number}
            lines.append({"time": number, "stage": "round", "round": number, "clients": 10, **traffic})
        for row in rows:
            method, last = str(row[len(keys) + 4]), float(str(row[len(keys) + 5]))
            accuracy = last - (0.97 - last) * 3 * (0.6 ** (number - 1) - 0.6 ** (rounds - 1))
            lines.append({"time": number, "stage": "candidate", "round": number, "method": method, "test_accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _pictures(folder: Path, point: str, place: int) -> None:
    """Drawn for the first point; the others have copies."""
    here, first = folder / "points" / point, folder / "points" / ".drawn"
    if not first.exists():
        first.mkdir()
        digits = load_digits()
        chosen = np.concatenate([np.flatnonzero(digits.target == k)[:4] for k in range(10)])
        images, labels = torch.tensor(digits.images[chosen][:, None] / 16, dtype=torch.float32), torch.tensor(digits.target[chosen])
        sheets = {"DI": Sheet(images, labels, list("0123456789")), "CMI": Sheet(images.flip(0), labels.flip(0), list("0123456789"))}
        draw_impressions(sheets, first / "impressions.png")
        draw_partition(np.eye(10, dtype=int) * 100, list("0123456789"), first / "partition.png", "made up")
    for name in ("impressions.png", "partition.png"):
        shutil.copyfile(first / name, here / name)
    (here / "report.html").write_text("<!doctype html><title>a run</title>")
