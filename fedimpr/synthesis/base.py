"""What a synthesizer is: a method that turns a teacher into impressions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fedimpr.errors import ConfigError, TeacherError
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


AT_ONCE = 500  # images that are labelled in one pass


def finished(teacher: nn.Module, images: Tensor, labels: Tensor, temperature: float, passes: int) -> Impressions:
    """Impressions with the teacher's softmax at a temperature as their targets.

    Args:
        teacher: frozen.
        images: (N, C, H, W), finished.
        labels: (N,), the classes that were wanted.
        temperature: of the targets.
        passes: images that went through the teacher so far; N are added.
    """
    return Impressions(images, label(teacher, images, temperature), labels, teacher_passes=passes + len(images))


def label(teacher: nn.Module, images: Tensor, temperature: float) -> Tensor:
    """The teacher's softmax at a temperature on finished images, (N, K).

    Raises:
        TeacherError: the teacher's logits are not finite.
    """
    with torch.no_grad():
        logits = torch.cat([teacher(part).float() for part in images.split(AT_ONCE)])
    _refuse_unless_finite(logits)
    return torch.softmax(logits / temperature, 1)


def classes_of(teacher: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """K, asked of the teacher with one black image.

    Raises:
        TeacherError: the teacher cannot take images of this shape, or its logits are not finite or no (1, K).
    """
    try:
        with torch.no_grad():
            logits = teacher(torch.zeros(1, *shape, device=device))
    except Exception as error:  # whatever a module may raise
        reason = " ".join(str(error).split())
        other = next((p.dtype for p in teacher.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
        remedy = "Give the shape it was trained on." if other is None else f"Its weights are {other}; cast it to float32."
        raise TeacherError(f"the teacher cannot take images of shape {shape}: {reason}", stage="synthesis", remedy=remedy) from error
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise TeacherError("the teacher must give logits (N, K) of two classes or more", stage="synthesis", value=tuple(logits.shape))
    _refuse_unless_finite(logits)
    return int(logits.shape[1])


def _refuse_unless_finite(logits: Tensor) -> None:
    if not bool(logits.isfinite().all()):
        raise TeacherError("the teacher's logits are not finite", stage="synthesis", remedy="Check the weights it was made of.")


def require(owner: object, *, above_zero: Iterable[str] = (), at_least_zero: Iterable[str] = ()) -> None:
    """Check ranges of an object's settings.

    Raises:
        ConfigError: the first that is out of range.
    """
    for key in above_zero:
        if getattr(owner, key) <= 0:
            raise ConfigError(key, getattr(owner, key), "a number > 0")
    for key in at_least_zero:
        if getattr(owner, key) < 0:
            raise ConfigError(key, getattr(owner, key), "a number >= 0")
