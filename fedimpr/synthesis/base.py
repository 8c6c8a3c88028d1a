"""What a synthesizer is: a method that turns a teacher into impressions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fedimpr.errors import TeacherError
from fedimpr.impressions import Impressions


class Progress(Protocol):
    """Called from long loops. ``done`` of ``total`` steps of ``stage`` are finished; ``info`` holds tensors or numbers worth showing."""

    def __call__(self, stage: str, done: int, total: int, **info: object) -> None:
        """Take note of the progress; must not raise."""


def silent(stage: str, done: int, total: int, **info: object) -> None:
    """The progress of those who do not watch."""


class Synthesizer(Protocol):
    """One class in one file; its fields are the method's hyper-parameters and have no defaults.

    ``synthesize`` leaves teacher and student as it found them (weights, mode, gradients, buffers, hooks), draws all randomness from
    ``generator`` and keeps what must outlive the call in ``state_dict``.
    """

    def synthesize(
        self,
        teacher: nn.Module,
        count: int,
        generator: torch.Generator,
        *,
        shape: tuple[int, int, int],
        student: nn.Module | None = None,
        progress: Progress = silent,
    ) -> Impressions:
        """Mine ``count`` impressions.

        Args:
            teacher: maps images (N, C, H, W) in [0, 1] to logits (N, K).
            count: how many, >= 1.
            generator: the source of all randomness.
            shape: (C, H, W) of the images.
            student: for adversarial methods, the model that learns from the impressions.
            progress: told after every step.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What must outlive a call; empty for methods without memory."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""


def label(teacher: nn.Module, images: Tensor, temperature: float) -> Tensor:
    """The teacher's softmax at a temperature on finished images, (N, K).

    Raises:
        TeacherError: the teacher's logits are not finite.
    """
    with torch.no_grad():
        logits = teacher(images)
    if not bool(logits.isfinite().all()):
        raise TeacherError("the teacher's logits are not finite", stage="synthesis", remedy="Check the weights it was made of.")
    return torch.softmax(logits / temperature, 1)


def classes_of(teacher: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """K, asked of the teacher with one black image."""
    with torch.no_grad():
        return int(teacher(torch.zeros(1, *shape, device=device)).shape[1])


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first tensor; the CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
