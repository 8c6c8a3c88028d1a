"""What a strategy tells those who watch: they evaluate, draw and write; the strategy does none of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from fedimpr.errors import UpdateError
from fedimpr.impressions import Bank
from fedimpr.update import Update


@dataclass(frozen=True)
class Cost:
    """What a global model cost the server.

    Attributes:
        seconds: wall time.
        images: impressions mined.
        mining_seconds: the part of the wall time that mining took.
        mining_passes: images that went through the teacher for mining.
        teacher_passes: images that went through the teacher altogether.
        steps: optimiser steps of the student.
        batch: images per step.
    """

    seconds: float
    images: int = 0
    mining_seconds: float = 0.0
    mining_passes: int = 0
    teacher_passes: int = 0
    steps: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Charge:
    """What a client's turn cost beside its training.

    Attributes:
        bytes_down: of the tensors that it was sent.
        bytes_up: of the tensors that it sent.
        device: the kind that it has; ``None`` without devices.
        simulated_seconds: of its turn on the virtual clock, from the first byte down to the last one up; ``None`` without devices.
        staleness: how many server steps were made while it was at work; ``None`` where rounds are synchronous.
    """

    bytes_down: int
    bytes_up: int
    device: str | None = None
    simulated_seconds: float | None = None
    staleness: int | None = None


@dataclass(frozen=True)
class Bill:
    """What a round cost, and all rounds up to it; see :class:`Charge` for what is counted.

    Attributes:
        bytes_down: of this round, to those whose answers were left out as well.
        bytes_up: of this round, of updates that were refused as well.
        total_down: bytes since the start of the run.
        total_up: the same.
        simulated_seconds: on the virtual clock since the start of the run; ``None`` without devices.
    """

    bytes_down: int
    bytes_up: int
    total_down: int
    total_up: int
    simulated_seconds: float | None


class Watch(Protocol):
    """Called in the order of the work; each method may raise only to stop the run."""

    def began(self, round: int) -> None:
        """A round begins, counted from 1; those before it are over."""

    def progress(self, stage: str, done: int, total: int, **info: object) -> None:
        """``done`` of ``total`` steps of ``stage`` are finished."""

    def excluded(self, error: UpdateError) -> None:
        """A client's answer is left out."""

    def update(self, round: int, update: Update, charge: Charge) -> None:
        """A good update, and what its client's turn cost; told in the order of partitions."""

    def answered(self, round: int, updates: int, seconds: float, bill: Bill) -> None:
        """All updates of a round are in: how many were good, how long the clients took, and what the round cost."""

    def candidate(self, round: int, name: str, model: nn.Module, cost: Cost) -> None:
        """A model for all clients is ready: the average, the ensemble, or a student."""

    def mined(self, round: int, method: str, bank: Bank, teacher: nn.Module) -> None:
        """A method has mined its impressions of this round."""

    def sources(self, round: int, clients: Sequence[int], models: Sequence[nn.Module], weights: Tensor) -> None:
        """The models of single source clients, and their weights, (M,), sum 1: how useful they are to the targets."""


class Nobody:
    """Looks at nothing."""

    def began(self, round: int) -> None:
        """Passed over."""

    def progress(self, stage: str, done: int, total: int, **info: object) -> None:
        """Passed over."""

    def excluded(self, error: UpdateError) -> None:
        """Passed over."""

    def update(self, round: int, update: Update, charge: Charge) -> None:
        """Passed over."""

    def answered(self, round: int, updates: int, seconds: float, bill: Bill) -> None:
        """Passed over."""

    def candidate(self, round: int, name: str, model: nn.Module, cost: Cost) -> None:
        """Passed over."""

    def mined(self, round: int, method: str, bank: Bank, teacher: nn.Module) -> None:
        """Passed over."""

    def sources(self, round: int, clients: Sequence[int], models: Sequence[nn.Module], weights: Tensor) -> None:
        """Passed over."""
