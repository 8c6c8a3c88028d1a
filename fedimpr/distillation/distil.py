"""Data-free distillation: mine a portion of impressions, let the student learn from all that are held, and again.

With one portion this is the two-stage scheme of ZSKD (Nayak et al., ICML 2019, algorithm 1); with many it is the alternation of CMI
(Fang et al., IJCAI 2021, algorithm 1). What the student learns are the teacher's answers; the
result is the student after the last step; no label of real data is ever looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of
from fedimpr.distillation.learning import Learner, Shown
from fedimpr.distillation.muon import Muon
from fedimpr.distillation.objectives import Objective
from fedimpr.distillation.resuming import Clock, Saves, Work
from fedimpr.distillation.starts import Starts, last_left
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Bank, Source
from fedimpr.observation import frozen, observe
from fedimpr.synthesis.base import Progress, Synthesizer, require, silent
from fedimpr.views import Augmentation


@dataclass(frozen=True, kw_only=True)
class Mining:
    """How many impressions a method mines, and when.

    Attributes:
        images: impressions altogether.
        before: how many of them are mined before the student takes its first step, without a look at it (CMI's pre-inverted images,
            FastDFKD's and NAYER's warm-up).
        portions: the others are mined in this many equal portions, each followed by an equal share of the student's steps; the last
            takes the rest.
        capacity: of the bank.
    """

    images: int
    before: int
    portions: int
    capacity: int

    def __post_init__(self) -> None:
        for key in ("portions", "capacity"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
        if self.before < 0:
            raise ConfigError("before", self.before, "an integer >= 0")
        if self.images < self.before + self.portions:
            raise ConfigError("images", self.images, f"an integer >= before + portions ({self.before + self.portions})")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the student learns from impressions that the teacher labels anew in each view.

    Attributes:
        steps: optimiser steps altogether.
        batch_size: impressions per step.
        candidates: views that are drawn for each one that the student learns from, >= 1. It learns from those on which its logits are the
            farthest from the teacher's, as detectors do (online hard example mining, Shrivastava et al., CVPR 2016, section 4); the others
            cost a pass through both. 1 takes them as they come.
        optimizer: ``"sgd"``, with Nesterov momentum, ``"adam"`` or ``"muon"``, see :class:`fedimpr.distillation.muon.Muon`.
        lr: peak learning rate; falls to zero along a cosine.
        momentum: in (0, 1); Adam's first beta, its second is 0.999.
        weight_decay: >= 0; of Muon apart from the gradient.
        objective: what brings the student closer to the teacher.
        views: augmentation of the impressions, the same view for teacher and student.
    """

    steps: int
    batch_size: int
    candidates: int
    optimizer: Literal["sgd", "adam", "muon"]
    lr: float
    momentum: float
    weight_decay: float
    objective: Objective
    views: Augmentation

    def __post_init__(self) -> None:
        require(self, above_zero=("steps", "batch_size", "candidates", "lr"), at_least_zero=("weight_decay",))
        if not 0 < self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "a number in (0, 1)")
        if self.optimizer not in ("sgd", "adam", "muon"):
            raise ConfigError("optimizer", self.optimizer, "'sgd', 'adam' or 'muon'")

    def optimiser_of(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of a student's parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, (self.momentum, 0.999), weight_decay=self.weight_decay)
        if self.optimizer == "muon":
            return Muon(parameters, self.lr, self.momentum, self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a student cost.

    Attributes:
        teacher_passes: images that went through the teacher, for mining and for distillation (an ensemble counts once).
        mining_passes: those of them that mining took.
        mining_seconds: wall time of mining.
        distilling_seconds: wall time of distillation.
    """

    teacher_passes: int
    mining_passes: int
    mining_seconds: float
    distilling_seconds: float


def mine_and_distil(
    teacher: nn.Module,
    student: nn.Module,
    synthesizer: Synthesizer,
    *,
    mining: Mining,
    distillation: Distillation,
    bank: Bank,
    source: Source,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    progress: Progress = silent,
    saves: Saves | None = None,
    starts: Starts | None = None,
) -> Spent:
    """Train ``student`` in place.

    Safe points lie after each call of the synthesizer, after each step of the student, and at the end, which is always saved. With what was
    saved at any of them, and else the same arguments, the work goes on to the same bits; a call of the synthesizer that was not over is
    made again.

    Args:
        teacher: maps images to logits; left as it was found.
        student: the model that learns, on the teacher's device.
        synthesizer: the method that mines.
        mining: how many impressions, and when.
        distillation: how the student learns.
        bank: where impressions are held; those of earlier rounds are learned from too.
        source: written beside the new impressions.
        shape: (C, H, W).
        generator: the source of all randomness.
        progress: told after every step.
        saves: keeps the state, and gives it back: student, synthesizer, bank and generator then become what they were.
        starts: other students that set out beside it once the first portion is mined; before its own first step ``student`` takes the
            weights of the one that is left. There is no safe point in between: who is left is found anew.

    Raises:
        ConfigError: a student of ``starts`` is of another architecture.
        FedimprError: the student's loss is not finite.
    """
    if starts is not None:
        starts.check(student)
    device, batch = device_of(teacher), distillation.candidates * distillation.batch_size

    def learner_of(student: nn.Module) -> Learner:
        objective = distillation.objective.bound(teacher, student, bank, shape, generator).to(device)
        optimiser = distillation.optimiser_of([*student.parameters(), *objective.parameters()])
        return Learner(student=student, objective=objective, optimiser=optimiser, batch_size=distillation.batch_size)

    with frozen(teacher):
        learner = learner_of(student)
    objective, optimiser = learner.objective, learner.optimiser
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, distillation.steps)
    clock = Clock(device)
    work = Work(
        student=student,
        objective=objective,
        optimiser=optimiser,
        cosine=cosine,
        synthesizer=synthesizer,
        bank=bank,
        generator=generator,
        clock=clock,
    )
    if saves is not None and (saved := saves.load()):
        work.load_state_dict(saved)

    def safe_point() -> None:
        if saves is not None and saves.due():
            saves.save(work.state_dict())

    def mine(until: int, looking_at: nn.Module | None) -> None:
        if (count := until - work.mined) <= 0:
            return  # there already: nothing comes before the first portion, or the work goes on after this
        told = _after(progress, work.mined, mining.images, count)
        with clock("mining"):
            impressions = synthesizer.synthesize(teacher, count, generator, shape=shape, student=looking_at, progress=told)
            bank.add(impressions, source)
        work.passes, work.mined = work.passes + impressions.teacher_passes, until
        safe_point()

    def show() -> Shown:
        sample = bank.sample(batch, generator)
        images = distillation.views(sample.images, generator)
        with torch.no_grad():
            wanted = observe(teacher, images, features=objective.features)
        return Shown(images=images, places=sample.places, wanted=wanted)

    for portion in range(work.portion, mining.portions):
        mine(mining.before, None)
        mine(mining.before + _until(mining.images - mining.before, portion, mining.portions), student)
        if starts is not None and portion == 0 and not work.begun:
            with clock("distilling"), frozen(teacher), accelerated(device), seeds.isolated(seeds.draw_seed(generator)):
                learners = [learner_of(copy.deepcopy(student)), *map(learner_of, starts.others)]
                for other in learners:
                    other.student.train()
                student.load_state_dict(last_left(learners, show, starts.steps, progress).state_dict())
        student.train()
        # Frozen once for the whole portion.
        with clock("distilling"), frozen(teacher), accelerated(device), work.learning():
            for _ in range(cosine.last_epoch, _until(distillation.steps, portion, mining.portions)):
                work.loss = learner.learn(show())
                cosine.step()
                progress("distilling", cosine.last_epoch, distillation.steps, loss=work.loss)
                safe_point()
        student.eval()
    if not bool(work.loss.isfinite()):
        remedy = "Lower distillation.lr."
        raise FedimprError("the student's loss is not finite", stage="distillation", value=float(work.loss), remedy=remedy)
    if saves is not None:
        saves.save(work.state_dict())
    return Spent(
        teacher_passes=work.passes + (distillation.steps + (starts.shared if starts is not None else 0)) * batch,
        mining_passes=work.passes,
        mining_seconds=clock.seconds["mining"],
        distilling_seconds=clock.seconds["distilling"],
    )


def _until(total: int, portion: int, portions: int) -> int:
    """Where a portion ends when ``total`` is cut into portions that differ by one at most."""
    return total * (portion + 1) // portions


def _after(progress: Progress, mined: int, images: int, count: int) -> Progress:
    """The progress of ``count`` images after ``mined`` as a part of all ``images``, in steps."""

    def told(stage: str, done: int, total: int, **info: object) -> None:
        progress(stage, mined * total // count + done, images * total // count, **info)

    return told
