"""What a client does in a round: on which images, with how many classes, and by which loss."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch

from fedimpr.continual.course import Course
from fedimpr.continual.rehearsal import Memory, Rehearsal
from fedimpr.data import Images
from fedimpr.devices import placed
from fedimpr.states import under
from fedimpr.training import Lesson, cross_entropy
from sim.config import Settings, construct
from sim.federation import build_model, course_of, device_of, shard_of
from strategies.continual import MEMORY, PREVIOUS
from strategies.federation import loaded
from strategies.records import Instruction


class Turn(NamedTuple):
    """What a client learns in a round.

    Attributes:
        data: its own images.
        classes: the outputs of the model; ``None``: one for each class of the data set.
        lesson: the loss.
    """

    data: Images
    classes: int | None
    lesson: Lesson


def turn_of(settings: Settings, partition: int, asked: Instruction) -> Turn:
    """The turn of a partition that takes part in a round."""
    course = course_of(settings)
    if course is None:
        return Turn(shard_of(settings, partition), None, cross_entropy)
    return _of_task(settings, course, partition, asked)


def _of_task(settings: Settings, course: Course, partition: int, asked: Instruction) -> Turn:
    """The turn of a client that works on a task, with what it was sent beside the weights."""
    step, kept = course.step(asked.round), settings.strategy["exemplars"]
    own, task = course.images(partition, step), course.task(partition, step)
    learnt = torch.tensor(course.brought(task.number))
    if kept == "all":
        past = course.earlier(partition, step, None, seed=settings.seed)
        own = Images(torch.cat([own.pixels, past.pixels]), torch.cat([own.labels, past.labels]), own.classes)
        learnt = torch.arange(course.classes(step))
    images, labels = (asked.beside.get(MEMORY + name) for name in ("images", "labels"))
    memory = None if images is None or labels is None else Memory(images, labels)
    if kept != "all" and kept > 0 and len(past := course.earlier(partition, step, kept, seed=settings.seed)):
        memory = Memory(past.pixels, past.labels)
    weights, previous = under(asked.beside, PREVIOUS), None
    if weights:
        previous = placed(loaded(build_model(settings, partition, course.classes(step - 1)), weights), device_of(settings))
    rehearsal: Rehearsal = construct(json.loads(json.dumps(settings.strategy["rehearsal"])), "strategy.rehearsal")
    return Turn(own, course.classes(step), rehearsal.bound(learnt, previous, memory, settings.seed, course.order))
