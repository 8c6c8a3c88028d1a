"""Writes a run down as it happens: evaluates what the strategy hands over, and fills the result folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fedimpr.devices import placed
from fedimpr.ensemble import Ensemble
from fedimpr.errors import FedimprError, UpdateError
from fedimpr.evaluation import evaluate
from fedimpr.impressions import Bank
from fedimpr.measures import describe, drawn
from fedimpr.models import Classifier
from fedimpr.update import Update
from sim.adapting import evaluation_of
from sim.by_task import INITIAL, score, write_matrices
from sim.config import Settings
from sim.curves import write_curves
from sim.federation import build_model, course_of, dataset_of, device_of, partition_of, rounds_of
from sim.grid import reason
from sim.progress import Progress
from sim.results import MEASURED, NEIGHBOURS, Row, RunFolder, Sheet, Status, peak_memory_mb, read_metrics, read_rows, replace_file
from sim.signals import interrupted
from sim.stages import is_point
from sim.tables import results
from sim.tracking import Run, Tracking
from sim.weights import weights_hash
from strategies import Bill, Charge, Cost
from strategies.federation import loaded

log = logging.getLogger(__name__)

ROWS_PER_SHEET = 4  # images of each class on a picture
BATCH = 500  # images in a pass that measures


class Recorder:
    """A :class:`strategies.Watch` that owns a result folder for the length of a ``with`` block.

    Leaving the block draws the pictures and the report and prints the table, whatever ended it.

    Args:
        settings: of the run.
        done: how many rounds are finished. A run that goes on in its own folder tells the next one anew, so what the metrics say of that
            is removed.
    """

    def __init__(self, settings: Settings, done: int = 0) -> None:
        self.settings, self.start = settings, time.monotonic()
        self.course, self.partition, self.rounds = course_of(settings), partition_of(settings), rounds_of(settings)
        self.data = dataset_of(settings) if self.course is None else self.course.data
        self.test, self.parts = evaluation_of(settings)  # parts of the test set that are looked at by themselves, by name
        resumed = settings.resume is not None and Path(settings.resume).resolve() == settings.folder.resolve()
        self.rows = {row.method: row for row in read_rows(settings.folder / "summary.json")} if resumed else {}
        told = _forget_after(settings.folder / "metrics.jsonl", done) if resumed else []
        self.tracking = Tracking(Run(settings=settings, folder=settings.folder, resumed=resumed))  # not yet at work
        self.folder = RunFolder(settings.folder, start=self.start, resumed=resumed, told=self.tracking)
        self.folder.rows(list(self.rows.values()))
        self.exclusions = [str(line["reason"]) for line in told if line["stage"] == "excluded"]
        self.sheets: dict[str, Sheet] = {}
        self.accuracies = {name: row.accuracy for name, row in self.rows.items()}
        self.round, self.members = done + 1, 0
        self.bill: Bill | None = None  # of this round
        self.scores: list[float] = []  # of this round's clients
        self.transfer: dict[str, float] = {}  # measures of the impressions that the next student learned from
        self.notes: list[str] = []  # on those impressions
        self.bar = Progress()

    def __enter__(self) -> Recorder:
        self.folder.write_config(yaml.safe_dump(json.loads(self.settings.to_json()), sort_keys=False))
        self.folder.write_manifest({**self.partition.manifest, "classes": self.data.train.classes})
        if self.course is not None and self.round == 1 and self.course.classes(0) == len(self.data.train.classes):
            # Where all classes are known from the start, later tasks can be asked of before they come.
            _, tasks = score(placed(build_model(self.settings, None), device_of(self.settings)), self.course, 0)
            self.folder.metric(INITIAL, round=0, tasks=tasks)
        self.tracking.start()
        self.bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, FedimprError):  # ours say themselves where they come from
            error.add_note(self.bar.where() or "before the first round")
        status: Status = "finished" if error is None else "interrupted" if interrupted(error) else "failed"
        try:
            self._conclude(status, error)
        except (FedimprError, OSError) as second:  # of a full disk, say, which is what ended the run: its error must not be lost
            if error is None:
                raise
            log.error("%s", second)
        finally:
            self.tracking.finish(status)

    def _conclude(self, status: Status, error: BaseException | None) -> None:
        facts = {"excluded": self.exclusions, "seed": self.settings.seed, "config_hash": self.settings.hash()}
        told = None if error is None else "; ".join([reason(error), *getattr(error, "__notes__", ())])
        self.folder.finish(status, error=told, **facts)
        from sim import plots, report  # matplotlib takes a second to import: only when there is something to draw

        manifest = self.partition.manifest
        recipe = ", ".join([manifest["dataset"], manifest["recipe"], *(f"{key} {value}" for key, value in manifest["parameters"].items())])
        plots.draw_partition(manifest["counts"], self.data.train.classes, self.folder.path / "partition.png", recipe)
        if self.sheets:
            plots.draw_impressions(self.sheets, self.folder.path / "impressions.png")
        if self.course is not None:
            write_matrices(self.folder.path, read_metrics(self.folder.path / "metrics.jsonl"), self.course)
        report.write_report(self.folder.path)
        write_curves(self.folder.path)
        print(results(list(self.rows.values())))
        print(f"{status}: {self.folder.path}")

    def began(self, round: int) -> None:
        """Name the round wherever its stages are told of."""
        self.round = round
        self.bar.round(round, self.rounds)

    def progress(self, stage: str, done: int, total: int, **info: object) -> None:
        """Move the bar; a hundred points of every curve go to the metrics."""
        self.bar(stage, done, total, **info)
        if is_point(done, total):
            values = {key: float(value) for key, value in info.items() if isinstance(value, int | float | torch.Tensor)}
            self.folder.metric(stage, round=self.round, step=done, total=total, **values)

    def excluded(self, error: UpdateError) -> None:
        """Log and count a client whose answer is left out."""
        log.warning("excluded: %s", error)
        self.exclusions.append(str(error))
        self.folder.metric("excluded", client=error.client, round=error.round, reason=str(error))

    def update(self, round: int, update: Update, charge: Charge) -> None:
        """Write a client's numbers down, after its model was evaluated where that is asked for."""
        values: dict[str, object] = {**update.metrics, **_known(asdict(charge))}
        if self.settings.evaluate_clients:
            classes = None if self.course is None else self.course.classes(self.course.step(round))
            model = loaded(build_model(self.settings, update.partition, classes), update.weights)
            judged = self._judged(round, placed(model, device_of(self.settings)))
            self.scores.append(judged["test_accuracy"])
            values |= judged
        self.folder.metric("client", round=round, client=update.partition, examples=update.examples, **values)

    def answered(self, round: int, updates: int, seconds: float, bill: Bill) -> None:
        """Write the round's costs down; the mean of the clients' accuracies becomes a row."""
        self.members, self.bill = updates, bill
        told = {"bytes_down": bill.bytes_down, "bytes_up": bill.bytes_up, "simulated_seconds": bill.simulated_seconds}
        self.folder.metric("round", round=round, clients=updates, **_known(told))
        if self.scores:
            self._row(round, "mean client", sum(self.scores) / len(self.scores), Cost(seconds))
            self.scores = []

    def candidate(self, round: int, name: str, model: nn.Module, cost: Cost) -> None:
        """Evaluate a model for all clients and keep its weights, where it is the round for it."""
        last = round == self.rounds if self.course is None else self.course.ends(round)
        if round % self.settings.evaluate_every and not last:
            return
        judged, weights = self._judged(round, model), weights_hash(model.state_dict())
        self.folder.metric("candidate", round=round, method=name, weights=weights, **judged, **asdict(cost))
        file = name.lower().replace(" ", "-")
        if isinstance(model, Ensemble):
            model.save(self.folder.path / f"{file}.safetensors")
        elif isinstance(model, Classifier):
            self.folder.weights(file, model.state_dict(), {"model": json.dumps(model.spec), "round": round})
        self._row(round, name, judged["test_accuracy"], cost, weights)

    def mined(self, round: int, method: str, bank: Bank, teacher: nn.Module) -> None:
        """Measure the impressions, for the report only, and keep a few of every class for the picture."""
        held, test = bank.images, self.test
        real, _ = test.batch(drawn(len(test), MEASURED))
        try:
            self.transfer = describe(teacher, held, bank.labels, real=real, limit=MEASURED, batch=BATCH, neighbours=NEIGHBOURS)
        except (FedimprError, RuntimeError) as error:  # too few images, no memory, no convergence: a run does not end for a measure
            log.warning("round %d: the impressions of %s are not measured: %s", round, method, error)
            self.transfer = {}
        self.notes = list(bank.notes)
        self.folder.metric("mined", round=round, method=method, held=len(bank), **self.transfer, notes=self.notes)
        classes = range(int(bank.targets.shape[1]))
        places = torch.cat([torch.nonzero(bank.labels == k).flatten()[:ROWS_PER_SHEET] for k in classes]).cpu()
        images, labels = held[places].cpu(), bank.labels[places].cpu()
        sheet, title = Sheet(images, labels, self.data.train.classes), method.upper()
        if self.course is not None:  # a picture of each task: those of the first are gone when the last is over
            from sim import plots

            task = self.course.step(round) + 1
            title += f" after task {task}"
            plots.draw_impressions({title: sheet}, self.folder.path / f"impressions-task-{task:03d}.png")
        self.sheets[title] = sheet

    def _judged(self, round: int, model: nn.Module) -> dict[str, Any]:
        """How good a model is on the test images, and on parts of them; with tasks on those of the tasks so far, and on each task."""
        if self.course is None:
            scores = dict(zip(("test_accuracy", "test_loss"), evaluate(model, self.test), strict=True))
            each = self.parts if len(self.parts) > 1 else {}
            return scores | {f"test_accuracy_{name}": evaluate(model, part).accuracy for name, part in each.items()}
        mean, tasks = score(model, self.course, self.course.step(round))
        return {"test_accuracy": mean.accuracy, "test_loss": mean.loss, "tasks": tasks}

    def sources(self, round: int, clients: Sequence[int], models: Sequence[nn.Module], weights: Tensor) -> None:
        """Evaluate the models of single clients; the best of them is chosen by this very evaluation, and its row says so."""
        accuracies = [evaluate(model, self.test).accuracy for model in models]
        for client, accuracy, weight in zip(clients, accuracies, weights.tolist(), strict=True):
            self.folder.metric("source", round=round, client=client, usefulness=weight, test_accuracy=accuracy)
        self._row(round, "best single source (by the test set)", max(accuracies), Cost(0.0))
        self._row(round, "mean single source", sum(accuracies) / len(accuracies), Cost(0.0))

    def _row(self, round: int, name: str, accuracy: float, cost: Cost, weights: str | None = None) -> None:
        self.accuracies[name] = accuracy
        ceiling = next((value for key, value in self.accuracies.items() if key.endswith(" ensemble")), None)
        costs = {key: value for key, value in asdict(cost).items() if key != "seconds" and value}
        if bill := self.bill:
            costs |= _known({"bytes_down": bill.total_down, "bytes_up": bill.total_up, "simulated_seconds": bill.simulated_seconds})
        self.rows[name] = Row(
            method=name, accuracy=accuracy, ratio=None, seconds=cost.seconds, clients=self.members, excluded=len(self.exclusions),
            peak_memory_mb=peak_memory_mb(), transfer=self.transfer or None, notes=self.notes or None, weights=weights, **costs,
        )  # fmt: skip
        self.transfer, self.notes = {}, []
        self.rows = {key: replace(row, ratio=row.accuracy / ceiling if ceiling else None) for key, row in self.rows.items()}
        self.folder.rows(list(self.rows.values()))


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _forget_after(path: Path, done: int) -> list[dict[str, Any]]:
    """Remove from metrics what they say of rounds after ``done``; return the rest. Steps of a long stage stay: it may go on inside."""
    lines = [line for line in read_metrics(path) if "step" in line or line.get("round", 0) <= done]
    replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return lines
