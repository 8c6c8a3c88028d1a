"""What every result file says beside its numbers."""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path

import torch

from sim.results import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, command: str, result: dict, table: str) -> None:
    """Write ``results/<name>.json`` and, for people, ``results/<name>.md``."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    head = {"command": command, "date": date.today().isoformat(), "commit": commit, "machine": machine(), "versions": versions()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**head, "gpu": gpu, **result}, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in {**head, "gpu": gpu}.items())
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n`{command}`\n\n{table}\n\n{facts}\n")
    print(table)


def named(override: str) -> str:
    """An override as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in override)
