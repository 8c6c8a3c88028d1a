"""A stream of tasks over a labelled data set, who works on which task when, and how a task's images are dealt to the clients.

A scenario draws a stream; :func:`cut` checks it and writes its manifest. Tasks and steps are counted from 0. Step t is the time in which
task t is the newest: a client that is not behind works on it then. Labels keep their numbers: a class is what the data set says it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedimpr import seeds
from fedimpr.data import Dataset, Images
from fedimpr.data.partition import Partition, Recipe, deal
from fedimpr.errors import ConfigError, DataError, PartitionError


class Share(NamedTuple):
    """The images of one task as a scenario gives them: its name, and indices into ``data.train`` and ``data.test``, int64."""

    name: str
    train: Tensor
    test: Tensor


class Scenario(Protocol):
    """A frozen dataclass whose fields are the scenario's parameters."""

    def __call__(self, data: Dataset, *, seed: int) -> list[Share]:
        """The images of each task, in the order in which tasks arrive.

        Raises:
            ConfigError: a parameter does not fit the data set.
            DataError: the scenario needs what the data set lacks.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ClassIncremental:
    """Every task brings classes that no other task has.

    Attributes:
        tasks: how many tasks of equally many classes, or the number of classes, >= 1, of each task; they add up to all classes.
        order: the classes by number, in the order in which they arrive; ``None`` draws the order from the seed.
    """

    tasks: int | tuple[int, ...]
    order: tuple[int, ...] | None

    def __call__(self, data: Dataset, *, seed: int) -> list[Share]:
        """As :class:`Scenario`."""
        names = data.train.classes
        sizes = self._sizes(len(names))
        order = _ordered("order", self.order, range(len(names)), seed, "class order")
        groups = torch.tensor(order).split(sizes)
        return [
            Share(
                ", ".join(names[k] for k in group.tolist()),
                *(torch.isin(images.labels, group).nonzero().flatten() for images in (data.train, data.test)),
            )
            for group in groups
        ]

    def _sizes(self, classes: int) -> list[int]:
        if isinstance(self.tasks, int):
            if self.tasks < 1 or classes % self.tasks:
                raise ConfigError("tasks", self.tasks, f"a number that divides the {classes} classes, or a list of each task's number")
            return [classes // self.tasks] * self.tasks
        if min(self.tasks, default=0) < 1 or sum(self.tasks) != classes:
            raise ConfigError("tasks", self.tasks, f"whole numbers >= 1 that add up to the {classes} classes (here {sum(self.tasks)})")
        return list(self.tasks)


@dataclass(frozen=True, kw_only=True)
class DomainIncremental:
    """Every task is a domain of the data set; classes may come back.

    Attributes:
        order: the domains by name, in the order in which they arrive; ``None`` draws the order from the seed.
    """

    order: tuple[str, ...] | None

    def __call__(self, data: Dataset, *, seed: int) -> list[Share]:
        """As :class:`Scenario`."""
        train, test, names = data.train.domains, data.test.domains, data.train.domain_names
        if train is None or test is None:
            raise DataError(f"{data.name} has no domains to make tasks of", remedy="Choose other tasks, or a data set such as pacs.")
        order = _ordered("order", self.order, names, seed, "domain order")
        numbers = [names.index(name) for name in order]
        return [
            Share(name, *((domains == number).nonzero().flatten() for domains in (train, test)))
            for name, number in zip(order, numbers, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Attributes:
        number: its place in the stream, from 0.
        name: the names of its classes, or of its domain.
        train: indices into ``data.train``, int64, ascending, one or more.
        test: indices into ``data.test``, int64, ascending, one or more.
        new: the classes, ascending, whose training images no task before had; may be empty where tasks are domains.
        seen: the classes, ascending, whose training images this task or one before has.
    """

    number: int
    name: str
    train: Tensor
    test: Tensor
    new: tuple[int, ...]
    seen: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in the order in which they arrive.

    Attributes:
        tasks: T tasks; every image of the data set is in exactly one.
        manifest: JSON-able: what was cut how (``dataset, scenario, parameters, seed``) and what came of it: ``tasks``, each with its
            ``name``, its ``new`` classes and its numbers of ``train`` and ``test`` images, and ``sha256`` over all sizes and indices.
    """

    tasks: tuple[Task, ...]
    manifest: dict[str, Any]


def cut(scenario: Scenario, data: Dataset, *, seed: int) -> Stream:
    """Cut a data set into tasks; the same arguments give the same manifest.

    Args:
        scenario: how.
        data: training and test images.
        seed: of the stream.

    Raises:
        ConfigError: a parameter does not fit the data set.
        DataError: a task has no images to learn from or to be tested on, or is tested on a class that nobody has seen by then; or the
            scenario needs what the data set lacks, gives an image twice, or leaves one out.
    """
    shares = [Share(name, train.sort().values, test.sort().values) for name, train, test in scenario(data, seed=seed)]
    for part, images, together in (("training", data.train, [s.train for s in shares]), ("test", data.test, [s.test for s in shares])):
        if not shares or not torch.equal(torch.cat(together).sort().values, torch.arange(len(images))):
            raise DataError(f"{_name(scenario)} does not put every {part} image of {data.name} into exactly one task")
    tasks: list[Task] = []
    for number, (name, train, test) in enumerate(shares):
        stage = f"task {number} ({name})"
        for part, indices in (("training", train), ("test", test)):
            if not len(indices):
                raise DataError(f"there is no {part} image", stage=stage, remedy="Give every task images, or leave its classes out.")
        before = set(tasks[-1].seen) if tasks else set()
        seen = before | set(data.train.labels[train].tolist())
        if unknown := set(data.test.labels[test].tolist()) - seen:
            names = ", ".join(f"{k} ({data.test.classes[k]})" for k in sorted(unknown))
            remedy = "Add training images of it, or leave its test images out."
            raise DataError(f"there are test images, but no training image so far, of class {names}", stage=stage, remedy=remedy)
        tasks.append(Task(number, name, train, test, tuple(sorted(seen - before)), tuple(sorted(seen))))
    manifest = {
        **{"dataset": data.name, "scenario": _name(scenario), "parameters": _plain(vars(scenario)), "seed": seed},
        "tasks": [{"name": task.name, "new": list(task.new), "train": len(task.train), "test": len(task.test)} for task in tasks],
        "sha256": _digest(indices for task in tasks for indices in (task.train, task.test)),
    }
    return Stream(tuple(tasks), manifest)


Attendance = tuple[tuple[int | None, ...], ...]


def attendance(tasks: int, *, joins: Sequence[int], behind: Sequence[int]) -> Attendance:
    """For each step and each client the number of the task that the client works on in that step; ``None``: it has none.

    A client works on one task a step, each task once, in order. One that is ``b`` tasks behind works on task t - b in step t, so a stream
    ends before it comes to the last ``b`` tasks.

    Args:
        tasks: T, as many as steps.
        joins: for each client the first task that it has images of, 0 where it is there from the start.
        behind: for each client how many tasks it is behind, 0 where it is in step.

    Raises:
        ConfigError: a client works on no task; or nobody works on task 0 in step 0, as every step must have a client, and every task.
    """
    if len(behind) != len(joins):
        raise ConfigError("behind", list(behind), f"{len(joins)} whole numbers, one a client, as joins has")
    for client, (first, lag) in enumerate(zip(joins, behind, strict=True)):
        if not 0 <= lag < tasks:
            raise ConfigError(f"behind[{client}]", lag, f"0 to {tasks - 1}, as there are {tasks} tasks")
        if not 0 <= first < tasks - lag:
            raise ConfigError(f"joins[{client}]", first, f"0 to {tasks - 1 - lag}, for a client that is {lag} of {tasks} tasks behind")
    if (0, 0) not in zip(joins, behind, strict=True):
        raise ConfigError("joins", list(joins), "0 for a client that is not behind, so that there is one in the first step")
    return tuple(
        tuple(step - lag if step - lag >= first else None for first, lag in zip(joins, behind, strict=True)) for step in range(tasks)
    )


def deal_task(recipe: Recipe, images: Images, task: Task, *, attendance: Attendance, minimum: int, seed: int, dataset: str) -> Partition:
    """Deal a task's training images to the clients that work on it in some step; the others get none.

    Args:
        recipe: how to draw.
        images: the whole training set, ``data.train``.
        task: of a stream over it.
        attendance: see :func:`attendance`.
        minimum: of images that each of those clients must have, >= 1.
        seed: of the dealing; each task draws from one that derives from it.
        dataset: the name for the manifest.

    Returns:
        For every client the indices into ``images``. The manifest is that of :func:`fedimpr.data.partition.deal` over all clients, with the
        number of the ``task`` and its ``members``, the clients that work on it.

    Raises:
        ConfigError: there are too many clients for the task's images, or a parameter is out of range.
        PartitionError: the recipe leaves a client short, or needs what the data set lacks.
    """
    members = [client for client, steps in enumerate(zip(*attendance, strict=True)) if task.number in steps]
    part, place, own = images.subset(task.train), f"task {task.number} ({task.name})", seeds.derive(seed, "task", task.number)
    try:
        dealt = deal(recipe, part, clients=len(members), minimum=minimum, seed=own, dataset=dataset)
    except ConfigError as error:
        raise ConfigError(error.key, error.value, f"{error.allowed}, in {place}") from None
    except PartitionError as error:
        stage = f"{place}, {error.stage}" if error.stage else place
        raise PartitionError(error.problem, stage=stage, remedy=error.remedy) from None
    indices = [task.train[:0]] * len(attendance[0])
    for client, shard in zip(members, dealt.indices, strict=True):
        indices[client] = task.train[shard]  # both ascending, so this is too
    manifest = {
        **dealt.manifest,
        **{"seed": seed, "clients": len(indices), "task": task.number, "members": members},
        "sizes": [len(shard) for shard in indices],
        "counts": [torch.bincount(images.labels[shard], minlength=len(images.classes)).tolist() for shard in indices],
        "sha256": _digest(indices),
    }
    return Partition(tuple(indices), manifest)


def _ordered(key: str, given: Sequence[Any] | None, all_: Sequence[Any], seed: int, purpose: str) -> list[Any]:
    """The given order, if it is one of all, or one that is drawn."""
    if given is None:
        return [all_[i] for i in torch.randperm(len(all_), generator=seeds.generator(seed, purpose)).tolist()]
    if sorted(given) != sorted(all_):
        raise ConfigError(key, given, f"each of {', '.join(map(str, all_))} once")
    return list(given)


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """With lists in place of tuples, as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in parameters.items()}


def _digest(parts: Iterable[Tensor]) -> str:
    """SHA-256 over the size and the indices of each part, as a partition's: little-endian, 64 bits each."""
    digest = hashlib.sha256()
    for indices in parts:
        digest.update(len(indices).to_bytes(8, "little") + indices.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _name(scenario: Scenario) -> str:
    """``class_incremental`` of ``ClassIncremental``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(scenario).__name__).lower()
