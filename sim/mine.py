"""The command line of a long synthesis: ``python -m sim.mine teacher=<file> synthesis=[cmi] output=<folder> count=1000 workers=2``.

The same command goes on where it was stopped. The folder then holds ``impressions.safetensors`` (images, targets and labels, all parts in
order), ``impressions.png`` and ``measures.json``.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedimpr.errors import ConfigError, FedimprError
from sim.__main__ import failed, guarded
from sim.config import CONFIGS, call
from sim.signals import interrupted

if TYPE_CHECKING:  # they import PyTorch, which takes seconds: --help must not wait for it
    from fedimpr.impressions import Impressions
    from sim.mining import Task

# What describe() looks at: more images hardly move its means, and cost passes through the teacher.
LIMIT, BATCH, NEIGHBOURS = 2000, 500, 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of ``configs/mine.yaml``, which says what they mean."""

    teacher: str | None
    student: str | None
    output: str | None
    count: int
    part_size: int
    streams: int
    workers: int
    threads: int
    compile: bool
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    dataset: Mapping[str, Any]
    synthesis: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self.synthesis) != 1:
            raise ConfigError("synthesis", list(self.synthesis), "one method, e.g. synthesis=[cmi]")
        if self.threads < 1:
            raise ConfigError("threads", self.threads, "an integer >= 1")


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="mine")
def hydra_main(config: DictConfig) -> None:
    """One job; of a sweep, one point."""
    try:
        run(call(Settings, OmegaConf.to_container(config, resolve=True), ""))  # type: ignore[arg-type]
    except (FedimprError, OmegaConfBaseException) as error:
        failed(error)


def run(settings: Settings) -> None:
    """Mine, write the products and print the table.

    Raises:
        FedimprError: a setting is wrong, or the job could not be finished.
    """
    if settings.teacher is None:
        raise ConfigError("teacher", None, "a file: what Ensemble.save wrote, or student-*.safetensors of a run")
    if settings.output is None:
        raise ConfigError("output", None, "a folder")
    import torch

    from fedimpr.synthesis.streams import Job
    from sim.mining import Task, mine
    from sim.progress import Progress

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "cpu or auto on a machine without a CUDA device")
    ((method, node),) = settings.synthesis.items()
    match settings.dataset["shape"]:
        case [int(channels), int(height), int(width)]:
            pass
        case other:
            raise ConfigError("dataset.shape", other, "three integers: channels, height, width")
    task = Task(
        job=Job(count=settings.count, part_size=settings.part_size, streams=settings.streams, seed=settings.seed),
        method=method,
        synthesizer=node["synthesizer"],
        teacher=Path(settings.teacher),
        student=None if settings.student is None else Path(settings.student),
        shape=(channels, height, width),
        device="cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu",
        threads=settings.threads,
        compile=settings.compile,
    )
    folder = Path(settings.output)
    try:
        with Progress(unit="images") as bar:
            made, seconds = mine(task, folder, workers=settings.workers, progress=bar)
    except BaseException as error:
        if interrupted(error):
            print(f"interrupted: finished parts are in {folder}; the same command goes on from there", file=sys.stderr)
        raise
    measures = _products(task, made, seconds, folder)
    print(_table(method, measures))
    print(f"finished: {folder}")


def _products(task: Task, made: Impressions, seconds: float, folder: Path) -> dict[str, Any]:
    """Write all that a finished job leaves beside its parts; return the measures."""
    import torch
    from safetensors.torch import save

    from fedimpr.measures import describe
    from sim.federation import threads
    from sim.plots import draw_impressions
    from sim.results import Sheet, replace_file

    tensors = {"images": made.images, "targets": made.targets, "labels": made.labels}
    notes = {"job": json.dumps(task.facts()), "teacher_passes": str(made.teacher_passes), "note": made.note}
    replace_file(folder / "impressions.safetensors", save(tensors, notes))
    classes = range(made.targets.shape[1])
    places = torch.cat([torch.nonzero(made.labels == k).flatten()[:4] for k in classes])
    sheet = Sheet(made.images[places], made.labels[places], [str(k) for k in classes])
    draw_impressions({task.method.upper(): sheet}, folder / "impressions.png")
    teacher, _ = task.models(task.device_of(0))
    with threads(task.threads):
        found = describe(teacher, made.images, made.labels, real=None, limit=LIMIT, batch=BATCH, neighbours=NEIGHBOURS)
    measures = {
        "method": task.method,
        "images": len(made),
        **({"note": made.note} if made.note else {}),
        **{name: value if math.isfinite(value) else None for name, value in found.items()},
        "label_fidelity": (made.targets.argmax(1) == made.labels).double().mean().item(),  # of all images, not of a sample
        "seconds": round(seconds, 3),  # summed over parts, whoever mined them
        "seconds_per_image": seconds / len(made),
        "teacher_passes": made.teacher_passes,
        "teacher_passes_per_image": made.teacher_passes / len(made),
    }
    replace_file(folder / "measures.json", (json.dumps(measures, indent=1) + "\n").encode())
    return measures


def _table(method: str, measures: Mapping[str, Any]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table("method", box=box.MARKDOWN)
    for name in ("images", "label fidelity (%)", "seconds an image", "teacher passes an image"):
        made.add_column(name, justify="right")
    cells = (f"{measures['seconds_per_image']:.4g}", f"{measures['teacher_passes_per_image']:.1f}")
    made.add_row(method, str(measures["images"]), f"{100 * measures['label_fidelity']:.2f}", *cells)
    out = io.StringIO()
    Console(file=out, width=100).print(made)
    return out.getvalue().strip()


def main() -> None:
    """The command."""
    guarded(hydra_main, "mine")


if __name__ == "__main__":
    main()
