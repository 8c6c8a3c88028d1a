"""CMI by ``fedimpr`` against the plain loop of ``plain_cmi.py``: the second part of ``synthesis_speed.py``.

Both mine a batch and then let a student learn, with the same settings, the same number of steps and a memory and images that were there
before, in one process, one after the other, again and again. Ours mines and distils as :func:`~fedimpr.distillation.mine_and_distil` always
does. Nothing else is timed than mining (with the labelling of its images, or their way to files) and distilling.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from ensemble import clock
from pairs import PAIRS
from plain_cmi import PlainCMI
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, placed
from fedimpr.distillation import Distillation, Mining, mine_and_distil
from fedimpr.impressions import Bank, Impressions, Source
from fedimpr.models import build
from fedimpr.observation import observe
from fedimpr.synthesis import ContrastiveModelInversion

REPEATS = 5
HELD = 25_600  # older images at most
Seconds = tuple[float, float]  # of mining and of distilling


@dataclass(frozen=True)
class Race:
    """What both start from, on the CPU; each way takes copies.

    Attributes:
        teacher: in eval mode.
        student: with fresh weights.
        settings: of CMI.
        distillation: of the student.
        memory: (B, 2, F) features of older instances.
        held: (N, C, H, W) older images.
        device: where both run.
    """

    teacher: nn.Module
    student: nn.Module
    settings: ContrastiveModelInversion
    distillation: Distillation
    memory: Tensor
    held: Tensor
    device: torch.device

    def ours(self) -> Seconds:
        teacher, student = (placed(copy.deepcopy(model), self.device) for model in (self.teacher, self.student))
        synthesizer, new = replace(self.settings), self.settings.batch_size
        synthesizer.load_state_dict({"memory": self.memory.to(self.device)})
        bank, older = Bank(len(self.held) + new), self.held.to(self.device)
        nothing = torch.full((len(older), 10), 0.1, device=self.device)  # the teacher labels anew in each view
        bank.add(Impressions(older, nothing, nothing.argmax(1), 0), Source("none", "older", 0, 0))
        spent = mine_and_distil(
            teacher,
            student,
            synthesizer,
            mining=Mining(images=new, before=0, portions=1, capacity=bank.capacity),
            distillation=self.distillation,
            bank=bank,
            source=Source("teacher", "cmi", 1, 0),
            shape=tuple(older.shape[1:]),
            generator=seeds.generator(0, "race"),
        )
        return spent.mining_seconds, spent.distilling_seconds

    def plain(self, *, frozen: bool, bfloat16: bool) -> Seconds:
        teacher, student = (copy.deepcopy(model).to(self.device) for model in (self.teacher, self.student))
        with tempfile.TemporaryDirectory() as folder, accelerated(self.device) if bfloat16 else nullcontext():
            opponent = PlainCMI(teacher, self.settings, self.memory, Path(folder), seeds.generator(0, "race"), frozen)
            opponent.write(self.held)
            start = clock(self.device)
            opponent.mine(student, 10, tuple(self.held.shape[1:]))
            between = clock(self.device)
            opponent.distil(student, self.distillation, self.distillation.objective.temperature)
            return between - start, clock(self.device) - between

    def first_losses(self) -> tuple[float, float]:
        """The loss of both on the same draws, contrasted with all of a small memory; on the CPU in float32.

        Raises:
            RuntimeError: they differ, so the two do not compute the same.
        """
        memory, shape = self.memory[:64], tuple(self.held.shape[1:])
        short, losses = replace(self.settings, steps=1, batch_size=8, negatives=len(memory)), []
        short.load_state_dict({"memory": memory})
        short.synthesize(
            copy.deepcopy(self.teacher),
            8,
            seeds.generator(0, "same"),
            shape=shape,
            student=copy.deepcopy(self.student),
            progress=lambda *_, loss, **__: losses.append(float(loss)),
        )
        with tempfile.TemporaryDirectory() as folder:
            plain = PlainCMI(copy.deepcopy(self.teacher), short, memory, Path(folder), seeds.generator(0, "same"), frozen=True)
            losses += plain.mine(copy.deepcopy(self.student), 10, shape)
        if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]):
            raise RuntimeError(f"ours and the plain loop do not compute the same: {losses}")
        return losses[0], losses[1]


def loop(asked: Any) -> tuple[dict, str]:
    """Measurements and text."""
    cuda = asked.device.type == "cuda"
    pair = PAIRS["cifar10_wrn" if cuda else "cifar10"]
    race = prepared(asked)
    same = race.first_losses()
    ways: dict[str, Callable[[Race], Seconds]] = {
        "ours": Race.ours,
        "plain": partial(Race.plain, frozen=False, bfloat16=False),
        "plain, weights frozen": partial(Race.plain, frozen=True, bfloat16=False),
    }
    if cuda:
        ways["plain, weights frozen, bfloat16"] = partial(Race.plain, frozen=True, bfloat16=True)
    short = replace(race, settings=replace(race.settings, steps=1), distillation=replace(race.distillation, steps=1))
    for way in ways.values():  # warms up
        way(short)
    spent: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(1 if asked.tiny else REPEATS):
        for name, way in ways.items():
            spent[name].append(way(race))
    settings, distillation = race.settings, race.distillation
    said = (
        f"{pair.said} CMI with the adversarial term: a batch of {settings.batch_size} images, {settings.steps} steps; then "
        f"{distillation.steps} steps of the student with {distillation.batch_size} images each, from {len(race.held):,} older images and "
        f"the new ones. {len(race.memory):,} instances in the memory, {settings.negatives:,} negatives. Medians of {len(spent['ours'])} "
        f"runs, taken in turn; ratios are taken run by run. Ours computes in {'bfloat16' if cuda else 'float32'}, plain in float32 unless "
        f"it says otherwise. Loss of the first step on the same draws: ours {same[0]:.6f}, plain {same[1]:.6f}. "
        "`benchmarks/plain_cmi.py` says what the plain loop does."
    )
    return {"seconds": spent, "first_losses": same}, f"{said}\n\n{table(spent)}"


def prepared(asked: Any) -> Race:
    """CIFAR-10's pair with CMI's settings: small ones on a CPU, the released ones beside a GPU."""
    cuda = asked.device.type == "cuda"
    pair = PAIRS["cifar10_wrn" if cuda else "cifar10"]
    run = pair.runs["cmi"](tiny=asked.tiny)
    settings, distillation = run.synthesizer, run.distillation
    assert isinstance(settings, ContrastiveModelInversion)
    if not asked.tiny:
        steps = asked.steps or (200 if cuda else 20)
        released = {"memory": 40_960, "negatives": 4096, "hidden": 4096, "projection": 256}
        settings = replace(settings, steps=steps, **(released if cuda else {"batch_size": 64}))
        distillation = replace(distillation, steps=2 * steps, batch_size=settings.batch_size)
    teacher, student = build(**pair.teacher, seed=0).eval(), build(**pair.student, seed=1)
    features = observe(teacher, torch.zeros(1, *pair.shape), features="batch_norm").features.shape[1]
    random = torch.Generator().manual_seed(0)
    memory = torch.randn(64 if asked.tiny else settings.memory, 2, features, generator=random)
    count = min(distillation.steps * distillation.batch_size, HELD)
    small = torch.rand(count, pair.shape[0], 8, 8, generator=random)
    held = F.interpolate(small, size=pair.shape[1:], mode="bilinear")  # smooth: files of noise would take longer to open
    return Race(teacher, student, settings, distillation, memory, held, asked.device)


def table(spent: dict[str, list[Seconds]]) -> str:
    """One line a way: medians of seconds, and of ratios to ours."""
    text = ["| loop | mining s | distilling s | mining / ours | distilling / ours | both / ours |", "|---" * 6 + "|"]
    for way, runs in spent.items():
        ratios = [(a / mine, b / distil, (a + b) / (mine + distil)) for (a, b), (mine, distil) in zip(runs, spent["ours"], strict=True)]
        cells = [f"{median(column):.3f}" for column in zip(*runs, strict=True)]
        cells += [f"{median(column):.2f}" for column in zip(*ratios, strict=True)]
        text.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(text)
