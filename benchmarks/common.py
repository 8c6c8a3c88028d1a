"""What every result file says beside its numbers, and runs that a command goes on with where it was stopped."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

from sim.results import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, command: str, result: dict, table: str) -> None:
    """Write ``results/<name>.json`` and, for people, ``results/<name>.md``. What was remarked below the last table's facts stays."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    head = {"command": command, "date": date.today().isoformat(), "commit": commit, "machine": machine(), "versions": versions()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**head, "gpu": gpu, **result}, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in {**head, "gpu": gpu}.items())
    page = RESULTS / f"{name}.md"
    _, _, last = (page.read_text() if page.exists() else "").partition("\n- gpu: ")
    remarks = last.partition("\n")[2]
    page.write_text(f"# {name}\n\n`{command}`\n\n{table}\n\n{facts}\n{remarks}")
    print(table)


def resumable(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that plays runs of ``python -m sim``, seed by seed."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--validation", action="store_true", help="evaluate on held-out training images")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides of the settings, which also name the result")


def played(
    kind: str,
    experiment: str,
    asked: argparse.Namespace,
    jobs: Sequence[tuple],
    keys: tuple[str, ...],
    play: Callable[..., dict],
    *,
    options: Sequence[str] = (),
) -> tuple[str, str, list[dict]]:
    """Play those jobs that ``results/<name>.jsonl`` has no line of yet; each that ends is one.

    Args:
        kind: of the benchmark: its file's name.
        experiment: that it runs.
        asked: what :func:`resumable` found.
        jobs: their values of ``keys``.
        keys: what tells one line from another.
        play: called with the experiment, a job's values and overrides.
        options: of the command beside those in ``asked``.

    Returns:
        The result's name, the command that gives it, and all lines.
    """
    name = f"{kind}_{experiment}{'_validation' * asked.validation}{''.join(f'_{named(text)}' for text in asked.more)}"
    file = RESULTS / f"{name}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    missing = [job for job in jobs if job not in {tuple(line[key] for key in keys) for line in done}]
    more = [*asked.more, *(["dataset.evaluate=validation"] if asked.validation else [])]
    with ThreadPoolExecutor(asked.workers) as pool:
        for line in pool.map(lambda job: play(experiment, *job, more), missing):
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            done.append(line)
    words = [*options, *(["--validation"] if asked.validation else []), *(["--more", *asked.more] if asked.more else [])]
    return name, " ".join([f"python benchmarks/{kind}.py", experiment, "--seeds", *map(str, asked.seeds), *words]), done


def named(override: str) -> str:
    """An override as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in override)
