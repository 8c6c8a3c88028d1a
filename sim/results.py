"""The result folder of one run: every file in it is readable at every moment, so a run that was killed still shows all it had finished."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedimpr.errors import FedimprError

if TYPE_CHECKING:  # PyTorch takes seconds to import, and a study's own process has no need of it
    from torch import Tensor

Status = Literal["running", "finished", "interrupted", "failed"]

# What an earlier run may have left in a folder that is used again.
PRODUCTS = ("metrics.jsonl", "curves.csv", "impressions.png", "partition.png", "report.html")

# Impressions, and evaluation images, that the measures look at, at most: a second or two of linear algebra.
MEASURED = 2000
NEIGHBOURS = 5  # of coverage, as in its paper


@dataclass(frozen=True)
class Row:
    """One line of the final table; what a method does not cost stays ``None``.

    Attributes:
        method: e.g. ``"mean client"``, ``"uniform ensemble"``, ``"student by DI"``.
        accuracy: on the test set, in [0, 1].
        ratio: accuracy over the ensemble's; ``None`` while there is no ensemble.
        seconds: wall time.
        images: impressions mined.
        mining_seconds: the part of the wall time that mining took.
        mining_passes: images that went through the teacher for mining.
        teacher_passes: images that went through the teacher.
        steps: optimiser steps of the student.
        batch: images per step.
        peak_memory_mb: of the process so far.
        clients: whose updates are in it.
        excluded: clients that were left out.
        bytes_down: that clients were sent since the start of the run, see :class:`strategies.watch.Charge`.
        bytes_up: that they sent.
        simulated_seconds: on the virtual clock since the start of the run; ``None`` without devices.
        transfer: measures of what the impressions carry over, by name, see :func:`fedimpr.measures.describe`.
        notes: what is worth knowing about the impressions, one sentence each.
        weights: of the model that was judged, see :func:`sim.weights.weights_hash`.
    """

    method: str
    accuracy: float
    ratio: float | None
    seconds: float
    images: int | None = None
    mining_seconds: float | None = None
    mining_passes: int | None = None
    teacher_passes: int | None = None
    steps: int | None = None
    batch: int | None = None
    peak_memory_mb: float | None = None
    clients: int | None = None
    excluded: int | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    simulated_seconds: float | None = None
    transfer: Mapping[str, float] | None = None
    notes: Sequence[str] | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Sheet:
    """A method's impressions for the picture.

    Attributes:
        images: (N, C, H, W) in [0, 1], C is 1 or 3.
        labels: (N,), the class each image was asked to show.
        class_names: K names.
        confidence: (N,) in [0, 1], the teacher's probability of that class.
    """

    images: Tensor
    labels: Tensor
    class_names: Sequence[str]
    confidence: Tensor | None = None


class RunFolder:
    """A run's result folder; opening it creates it and marks the run as running.

    Args:
        path: the folder. What an earlier run left there is replaced.
        start: ``time.monotonic()`` at the run's start; all times count from it.
        resumed: the run goes on from this very folder: its metrics stay and new ones follow.
        told: called with every line of the metrics, after it was written.

    Raises:
        FedimprError: here and in every method, if a file cannot be written.
    """

    def __init__(
        self, path: Path | str, *, start: float, resumed: bool = False, told: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.path, self.start, self.told = Path(path), start, told
        self._run: dict[str, object] = {"status": "running", "started": datetime.now().astimezone().isoformat(timespec="seconds")}
        with _named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for name in PRODUCTS[1:] if resumed else PRODUCTS:
                (self.path / name).unlink(missing_ok=True)
            _cut_broken_tail(self.path / "metrics.jsonl")
        self.rows([])
        self._write_run({"versions": versions(), "machine": machine()})

    def write_config(self, text: str) -> None:
        """The composed configuration, as YAML."""
        replace_file(self.path / "config.yaml", text.encode())

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Who got which images, as ``fedimpr.data.partition`` describes it."""
        replace_file(self.path / "manifest.json", _json(manifest))

    def metric(self, stage: str, **values: object) -> None:
        """Append one line of values to ``metrics.jsonl``; what is not finite becomes ``null``, and ``note`` says what it was."""
        path = self.path / "metrics.jsonl"
        line = _json({"time": round(time.monotonic() - self.start, 3), "stage": stage, **values}, indent=None)
        with _named(path), path.open("ab") as file:
            file.write(line)
        if self.told is not None:
            self.told(json.loads(line))

    def rows(self, rows: Sequence[Row]) -> None:
        """Write the table as far as it is known, as JSON and as CSV."""
        replace_file(self.path / "summary.json", _json([_with_note(asdict(row)) for row in rows]))
        measures = list(dict.fromkeys(name for row in rows for name in row.transfer or ()))
        plain = [field for field in Row.__dataclass_fields__ if field not in ("transfer", "notes")]
        table = (
            [*(getattr(row, name) for name in plain), "; ".join(row.notes or ()), *((row.transfer or {}).get(name) for name in measures)]
            for row in rows
        )
        replace_file(self.path / "summary.csv", csv_of([*plain, "notes", *(f"transfer.{name}" for name in measures)], table))

    def weights(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> Path:
        """Write tensors as ``<name>.safetensors``; texts of the metadata stay as they are, other values become JSON."""
        from safetensors.torch import save

        path = self.path / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.safetensors"
        notes = {key: value if isinstance(value, str) else _json(value, indent=None).decode().strip() for key, value in metadata.items()}
        # Clones, because safetensors refuses tensors that share memory.
        replace_file(path, save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, notes))
        return path

    def finish(self, status: Status, *, error: str | None = None, **facts: object) -> None:
        """Close the run's record: how it ended, what it took, and any further facts (seed, config hash, excluded clients, ...)."""
        cost = {"wall_seconds": round(time.monotonic() - self.start, 3), "peak_memory_mb": round(peak_memory_mb(), 1)}
        self._write_run({"status": status, "error": error, **cost, "machine": machine(), **facts})

    def _write_run(self, facts: Mapping[str, object]) -> None:
        self._run.update(facts)
        replace_file(self.path / "run.json", _json(self._run))


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that was cut off is left out, and a missing file holds none.

    Raises:
        FedimprError: the file cannot be read, or another line is damaged.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise FedimprError(f"cannot read {path}: {error.strerror or error}", stage="reading results") from error
    metrics = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                metrics.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                if number < len(lines):  # after the last newline there is nothing, or a line that was cut off
                    remedy = "Delete that line."
                    raise FedimprError(f"{path}, line {number} is not a JSON object", stage="reading results", remedy=remedy) from None
    return metrics


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``summary.json``; none where it is missing or damaged."""
    try:
        return [Row(**{key: value for key, value in row.items() if key != "note"}) for row in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def csv_of(head: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A table as CSV in UTF-8, a line a row; ``None`` is an empty cell."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(head)
    table.writerows(rows)
    return out.getvalue().encode(errors="replace")


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux


def versions() -> dict[str, str]:
    """What decides a result beside the configuration."""
    found = {"python": platform.python_version()}
    for package in ("torch", "flwr", "fedimpr"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, object]:
    """The processor, the cores this process may use, and the GPU if it has used one."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")  # who has not imported it has used no GPU
    gpu = {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_initialized() else {}
    return {"cpu": cpu, "cores": cores, "system": platform.platform(), **gpu}


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        FedimprError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with _named(path):
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "Free some space, or choose another folder with output=<folder>."
        raise FedimprError(f"cannot write {path}: {error.strerror or error}", stage="saving results", remedy=remedy) from error


def _cut_broken_tail(path: Path) -> None:
    """Remove a last line without its end, so that the next one does not grow out of it."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _json(value: object, *, indent: int | None = 1) -> bytes:
    """Strict JSON with a newline at its end; see :func:`_plain`."""
    plain = _with_note(value) if isinstance(value, Mapping) else _plain(value, "", [])
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)
    text = re.sub(r'\[\n[^][{}"]*\]', lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)  # lists of numbers on one line
    return (text + "\n").encode(errors="replace")


def _with_note(value: Mapping[Any, Any]) -> dict[str, object]:
    notes: list[str] = []
    plain = {str(key): _plain(item, str(key), notes) for key, item in value.items()}
    return plain | {"note": "; ".join(notes)} if notes else plain


def _plain(value: object, name: str, notes: list[str]) -> object:
    """What JSON knows; numbers that are not finite become ``None`` and are told to ``notes``."""
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        notes.append(f"{name} is {value}")
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", notes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{place}]", notes) for place, item in enumerate(value)]
    return str(value)
