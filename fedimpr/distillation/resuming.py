"""Distillation that may be stopped: all that changes while a student is made is one state, from which it goes on to the same bits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import device_of
from fedimpr.distillation.objectives import Loss
from fedimpr.impressions import Bank
from fedimpr.states import from_note, to_note, under
from fedimpr.synthesis.base import Synthesizer


class Saves(Protocol):
    """Where a long piece of work keeps its state. It is asked at safe points: where the work can go on from a state."""

    def load(self) -> Mapping[str, Tensor]:
        """What was saved last, on any device; empty before that."""

    def due(self) -> bool:
        """Whether what was saved last is old enough to be replaced."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace what was saved last."""


class Clock:
    """Wall time by stage. On an accelerator it waits for the work of a stage to end.

    Attributes:
        seconds: by stage, without the running one's since its last :meth:`lap`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._stage: str | None = None
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's time to ``stage``."""
        self._stage, self._since = stage, time.perf_counter()
        yield
        self.lap()
        self._stage = None

    def lap(self) -> None:
        """Bring :attr:`seconds` up to date in the middle of a stage."""
        if self._stage is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since = now


@dataclass(kw_only=True)
class Work:
    """All that changes while a student is made.

    Attributes:
        student: the model that learns.
        objective: its loss.
        optimiser: of the student's and the objective's parameters.
        cosine: of the optimiser's learning rate; counts the steps.
        synthesizer: mines.
        bank: holds what was mined.
        generator: the source of all randomness.
        clock: what was spent.
        portion: at work; as many as there are when all is done.
        begun: whether the student has begun to learn from this portion.
        mined: impressions so far.
        passes: images that went through the teacher for them.
        loss: (), of the student's last step.
    """

    student: nn.Module
    objective: Loss
    optimiser: torch.optim.Optimizer
    cosine: torch.optim.lr_scheduler.LRScheduler
    synthesizer: Synthesizer
    bank: Bank
    generator: torch.Generator
    clock: Clock
    portion: int = 0
    begun: bool = False
    mined: int = 0
    passes: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        self._random: dict[str, Tensor] = {}  # PyTorch's global states at the safe point that was loaded

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The student's steps on a portion.

        Global randomness, which dropout draws from, is the block's own; in a portion that was begun before, it goes on where it was.
        """
        with seeds.isolated(0 if self.begun else seeds.draw_seed(self.generator)):
            if self.begun:
                self._take_random()
            self.begun = True
            yield
        self.portion, self.begun = self.portion + 1, False

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is needed to go on from a safe point, as copies."""
        self.clock.lap()
        state = {f"bank/{key}": value for key, value in self.bank.state_dict().items()}
        state |= {f"synthesizer/{key}": value for key, value in self.synthesizer.state_dict().items()}
        state |= {f"student/{key}": value.clone() for key, value in self.student.state_dict().items()}
        state |= {f"objective/{key}": value.clone() for key, value in self.objective.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            state |= {f"optimiser/{index}/{name}": value.clone() for name, value in moments.items() if value is not None}
        state |= {f"generator/{name}": generator.get_state() for name, generator in self._generators().items()}
        if self.begun:
            state["random/cpu"] = torch.get_rng_state()
            if (device := device_of(self.student)).type == "cuda":
                state["random/cuda"] = torch.cuda.get_rng_state(device)
        counts = {"portion": self.portion, "begun": self.begun, "mined": self.mined, "passes": self.passes}
        note = to_note({**counts, "cosine": self.cosine.state_dict(), "seconds": self.clock.seconds})
        return {**state, "loss": self.loss.clone(), "note": note}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        device, note = device_of(self.student), from_note(state["note"])
        self.portion, self.begun, self.mined, self.passes = (note[key] for key in ("portion", "begun", "mined", "passes"))
        self.clock.seconds, self.loss = note["seconds"], state["loss"]
        self.student.load_state_dict(under(state, "student/"))
        self.objective.load_state_dict(under(state, "objective/"))
        self.synthesizer.load_state_dict(under(state, "synthesizer/"))
        self.bank.load_state_dict({key: value.to(device) for key, value in under(state, "bank/").items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in under(state, "optimiser/").items():
            index, _, name = key.partition("/")
            moments.setdefault(int(index), {})[name] = value.clone()
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.cosine.load_state_dict(note["cosine"])
        for group, lr in zip(self.optimiser.param_groups, self.cosine.get_last_lr(), strict=True):
            group["lr"] = lr
        for name, generator in self._generators().items():
            generator.set_state(state[f"generator/{name}"].cpu())
        self._random = under(state, "random/")

    def _generators(self) -> dict[str, torch.Generator]:
        """The source of all randomness, and what the objective draws from: on an accelerator that is a generator of its own."""
        held = {name: value for name, value in vars(self.objective).items() if isinstance(value, torch.Generator)}
        return {"source": self.generator, **held}

    def _take_random(self) -> None:
        torch.set_rng_state(self._random["cpu"].cpu())
        if "cuda" in self._random:
            torch.cuda.set_rng_state(self._random["cuda"].cpu(), device_of(self.student))
