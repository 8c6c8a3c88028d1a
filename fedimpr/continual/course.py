"""The course of a continual federation: which client works on which images in which round, and how many classes are known by then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedimpr import seeds
from fedimpr.continual.stream import Attendance, Scenario, Task, attendance, cut, deal_task
from fedimpr.data import Dataset, Images
from fedimpr.data.partition import Partition, Recipe
from fedimpr.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Course:
    """Tasks, and who works on them when. Rounds are counted from 1, steps and tasks from 0.

    Attributes:
        data: with its classes numbered in the order in which they arrive, so that a head grows at its end.
        order: the number that each of them has in the data set.
        tasks: T tasks over it.
        attendance: see :func:`fedimpr.continual.stream.attendance`.
        shards: each task's images by client, indices into ``data.train``.
        rounds: federated rounds of each step, >= 1.
        manifest: JSON-able: the stream's, with the sum over tasks of each client's images by class, and each task's own.
    """

    data: Dataset
    order: tuple[int, ...]
    tasks: tuple[Task, ...]
    attendance: Attendance
    shards: tuple[Partition, ...]
    rounds: int
    manifest: dict[str, Any]

    @property
    def total(self) -> int:
        """The rounds of the whole course."""
        return self.rounds * len(self.tasks)

    def step(self, round: int) -> int:
        """The step that a round belongs to."""
        return (round - 1) // self.rounds

    def begins(self, round: int) -> bool:
        """Whether a round is the first of its step."""
        return (round - 1) % self.rounds == 0

    def ends(self, round: int) -> bool:
        """Whether a round is the last of its step."""
        return round % self.rounds == 0

    def classes(self, step: int) -> int:
        """How many classes are known in a step: the outputs of its model."""
        return len(self.tasks[step].seen)

    def brought(self, task: int) -> tuple[int, ...]:
        """The classes, ascending, that a task's training images show: its new ones, and those that come back."""
        return tuple(self.data.train.labels[self.tasks[task].train].unique().tolist())

    def members(self, step: int) -> list[int]:
        """The clients that have work in a step, ascending."""
        return [client for client, task in enumerate(self.attendance[step]) if task is not None]

    def task(self, client: int, step: int) -> Task:
        """What a client works on in a step in which it has work."""
        number = self.attendance[step][client]
        assert number is not None, "a client without work is not asked"
        return self.tasks[number]

    def images(self, client: int, step: int) -> Images:
        """A client's images of the task that it works on."""
        return self.data.train.subset(self.shards[self.task(client, step).number].indices[client])

    def earlier(self, client: int, step: int, count: int | None, *, seed: int) -> Images:
        """A client's images of the tasks that it worked on before, all of them or ``count``, as many of each task as of any other.

        A method that looks at them has kept what it should not: they are for upper references. Fewer where a task has fewer.
        """
        past = sorted({number for row in self.attendance[:step] if (number := row[client]) is not None})
        shards = [self.shards[number].indices[client] for number in past]
        if count is not None:
            shares = [count * (place + 1) // len(past) - count * place // len(past) for place in range(len(past))]
            drawn = [seeds.generator(seed, "exemplars", number, client) for number in past]
            shards = [s[torch.randperm(len(s), generator=g)[:share]] for s, g, share in zip(shards, drawn, shares, strict=True)]
        return self.data.train.subset(torch.cat(shards) if shards else torch.zeros(0, dtype=torch.int64))


def plan_course(
    scenario: Scenario,
    data: Dataset,
    recipe: Recipe,
    *,
    clients: int,
    rounds: int,
    joins: Sequence[int] | None,
    behind: Sequence[int] | None,
    minimum: int,
    seed: int,
) -> Course:
    """Cut a data set into tasks, number its classes in the order of their arrival, and deal each task to its clients.

    Args:
        scenario: how tasks are cut.
        data: training and test images.
        recipe: how a task is dealt.
        clients: how many.
        rounds: of each step, >= 1.
        joins: for each client the first task that it has images of; ``None``: all are there from the start.
        behind: for each client how many tasks it is behind; ``None``: all are in step.
        minimum: of images that each client of a task has.
        seed: of the run.

    Raises:
        FedimprError: as :func:`fedimpr.continual.stream.cut`, ``attendance`` and ``deal_task``.
    """
    if rounds < 1:
        raise ConfigError("rounds", rounds, "an integer >= 1")
    with _under("scenario"):
        stream = cut(scenario, data, seed=seed)
    if len(stream.tasks[0].seen) < 2:
        raise ConfigError("tasks", stream.tasks[0].name, "a first task of two classes or more: a model of one has nothing to tell apart")
    present = attendance(len(stream.tasks), joins=_for_each("joins", joins, clients), behind=_for_each("behind", behind, clients))
    data, order, tasks = _in_order_of_arrival(data, stream.tasks)
    with _under("partition"):
        dealing: dict[str, Any] = {"attendance": present, "minimum": minimum, "seed": seed, "dataset": data.name}
        shards = tuple(deal_task(recipe, data.train, task, **dealing) for task in tasks)
    counts = torch.tensor([shard.manifest["counts"] for shard in shards]).sum(0)
    own = shards[0].manifest
    manifest = {
        **{"dataset": data.name, "recipe": own["recipe"], "parameters": own["parameters"], "seed": seed, "clients": clients},
        **{"sizes": counts.sum(1).tolist(), "counts": counts.tolist(), "tasks": stream.manifest},
        **{"dealt": [shard.manifest for shard in shards], "attendance": [list(row) for row in present]},
    }
    return Course(data, order, tasks, present, shards, rounds, manifest)


@contextmanager
def _under(node: str) -> Iterator[None]:
    """A setting that is refused inside is one of a node's."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{node}.{error.key}", error.value, error.allowed) from None


def _for_each(key: str, given: Sequence[int] | None, clients: int) -> Sequence[int]:
    if given is None:
        return [0] * clients
    if len(given) != clients:
        raise ConfigError(key, list(given), f"null, or {clients} whole numbers, one a client")
    return given


def _in_order_of_arrival(data: Dataset, tasks: Sequence[Task]) -> tuple[Dataset, tuple[int, ...], tuple[Task, ...]]:
    """The same images and tasks, with the classes numbered as they arrive; those that never do come last. And their old numbers."""
    arrived = list(tasks[-1].seen and [k for task in tasks for k in task.new])
    order = [*arrived, *(k for k in range(len(data.train.classes)) if k not in arrived)]
    place = torch.empty(len(order), dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(len(order))
    names = tuple(data.train.classes[k] for k in order)
    train, test = (replace(images, labels=place[images.labels], classes=names) for images in (data.train, data.test))
    known, renamed = 0, []
    for task in tasks:
        renamed.append(replace(task, new=tuple(range(known, known + len(task.new))), seen=tuple(range(known + len(task.new)))))
        known += len(task.new)
    return Dataset(data.name, train, test), tuple(order), tuple(renamed)
