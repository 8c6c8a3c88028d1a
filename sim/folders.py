"""Result folders read for a comparison: what is damaged is named, and the rest is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedimpr.errors import FedimprError
from sim.results import read_metrics
from sim.weights import weights_hash


@dataclass
class Found:
    """What a result folder holds; ``None`` is what could not be read.

    Attributes:
        name: for tables, e.g. ``"A"``.
        folder: where it is.
        config: the settings.
        run: how it went, versions, machine.
        manifest: who holds what.
        rows: the final table by method.
        metrics: the lines told.
        problems: one line for each file that could not be compared.
    """

    name: str
    folder: Path
    config: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any]] | None = None
    metrics: list[dict[str, Any]] | None = None
    problems: list[str] = field(default_factory=list)

    def problem(self, file: str, what: str) -> None:
        """Name a file that cannot be compared."""
        self.problems.append(f"{self.folder / file} {what}; the rest is compared")

    def weights(self) -> dict[str, Stored]:
        """The candidates' weights, by the names of their files."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                found[path.stem] = Stored(path)
            except (OSError, SafetensorError) as error:
                self.problem(path.name, f"is damaged ({' '.join(str(error).split())})")
        return found


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read one at a time: an ensemble may be larger than memory.

    Attributes:
        hash: see :func:`sim.weights.weights_hash`.
    """

    def __init__(self, path: Path) -> None:
        self.file = safe_open(str(path), framework="pt")
        self.names = list(self.file.keys())
        self.hash = weights_hash(self)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_run(folder: Path, name: str) -> Found:
    """All of a result folder but its weights.

    Raises:
        FedimprError: there is no such folder, or no run in it.
    """
    if not (folder / "run.json").exists():
        problem = f"there is no run in {folder}" if folder.is_dir() else f"there is no folder {folder}"
        raise FedimprError(problem, stage="comparing", remedy="Give the folder that a run names at its end.")
    found = Found(name, folder)
    found.run, found.manifest = _mapping(found, "run.json", json.loads), _mapping(found, "manifest.json", json.loads)
    found.config = _mapping(found, "config.yaml", yaml.safe_load)
    rows = _read(found, "summary.json", json.loads)
    if isinstance(rows, list) and all(isinstance(row, dict) and "method" in row for row in rows):
        found.rows = {str(row["method"]): row for row in rows}
    elif rows is not None:
        found.problem("summary.json", "holds no table")
    if (content := _read(found, "metrics.jsonl", str)) is not None:
        try:
            found.metrics = read_metrics(folder / "metrics.jsonl")
        except FedimprError as error:
            found.problems.append(str(error))
        if content and not content.endswith("\n"):
            found.problem("metrics.jsonl", "is cut off in its last line")
    return found


def _mapping(found: Found, file: str, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    content = _read(found, file, parse)
    if content is not None and not isinstance(content, dict):
        found.problem(file, "holds no mapping")
        return None
    return content


def _read(found: Found, file: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse((found.folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.problem(file, "is missing")
    except OSError as error:
        found.problem(file, f"cannot be read ({error.strerror or error})")
    except (ValueError, yaml.YAMLError):
        found.problem(file, "is damaged")
    return None
