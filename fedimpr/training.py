"""Local training: a client's model learns from the client's own images, and from what else a lesson brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.data import Images
from fedimpr.devices import device_of
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.views import Views


class Lesson(Protocol):
    """What a step of local training learns: a loss."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the logits (N, K) of the client's images.

        Args:
            model: in training mode.
            images: (N, C, H, W) in [0, 1], augmented.
            labels: (N,).
            generator: the source of all randomness.
        """
        ...


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The :class:`Lesson` of a client that learns from nothing but its labels."""
    logits = model(images)
    return F.cross_entropy(logits, labels), logits


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """SGD with momentum.

    Attributes:
        epochs: passes over the client's images.
        batch_size: images per step; a last batch of a single image is left out, since batch norm cannot use it.
        lr: constant learning rate.
        momentum: in [0, 1).
        momentum_kept: whether a client's next turn begins with the momentum that its last one ended with, instead of none. Its last one
            began from other weights, of an earlier round.
        weight_decay: >= 0.
        clip: largest norm of a step's gradient; ``None``: it is left as it is.
        views: augmentation of the images.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    momentum_kept: bool
    weight_decay: float
    clip: float | None
    views: Views

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "lr", "clip"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ConfigError(key, getattr(self, key), "a number > 0")
        if not 0 <= self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "a number in [0, 1)")
        if self.momentum_kept and not self.momentum:
            raise ConfigError("momentum_kept", True, "false without momentum")

    def __call__(
        self,
        model: nn.Module,
        data: Images,
        generator: torch.Generator,
        lesson: Lesson = cross_entropy,
        momentum: dict[str, Tensor] | None = None,
    ) -> dict[str, float]:
        """Train ``model`` in place; return ``{"loss": mean over the last epoch, "accuracy": share of its views classified rightly}``.

        Args:
            model: any.
            data: the client's images.
            generator: the source of all randomness.
            lesson: what a step learns.
            momentum: that of the client's last turn, by the names of the parameters, on the CPU; empty before its first. It is replaced by
                that of this turn. ``None``: there was none, and nobody asks for it.

        Raises:
            FedimprError: the loss is not finite.
        """
        device = device_of(model)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        velocities = {name: velocity.to(device, copy=True) for name, velocity in (momentum or {}).items()}
        model.train()
        with seeds.isolated(seeds.draw_seed(generator)):  # for models with dropout
            for _ in range(self.epochs):
                told, seen = list[Tensor](), 0  # of this epoch: each step's loss and hits, and the images
                for places in torch.randperm(len(data), generator=generator).split(self.batch_size):
                    if len(places) == 1 < min(len(data), self.batch_size):
                        continue
                    images, labels = (part.to(device, non_blocking=True) for part in data.batch(places))
                    loss, logits = lesson(model, self.views(images, generator), labels, generator)
                    for parameter in named.values():
                        parameter.grad = None
                    loss.backward()
                    self._step(named, velocities)
                    told.append(torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()]))
                    seen += len(labels)
        model.eval()
        loss_sum, hits_sum = torch.stack(told).sum(0).tolist()
        if not loss_sum == loss_sum or loss_sum == float("inf"):
            raise FedimprError("the loss is not finite", stage="local training", value=loss_sum, remedy="Lower training.lr.")
        if momentum is not None:
            momentum |= {name: velocity.cpu().contiguous() for name, velocity in velocities.items()}
        return {"loss": loss_sum / seen, "accuracy": hits_sum / seen}

    @torch.no_grad()
    def _step(self, named: Mapping[str, nn.Parameter], velocities: dict[str, Tensor]) -> None:
        """One step of what ``clip_grad_norm_`` and ``torch.optim.SGD`` do, for all tensors in a few calls.

        Those two look at one tensor after another, a quarter of a millisecond for a LeNet-5, and that class imports PyTorch's compiler, two
        seconds a process.
        """
        learnt = {name: parameter for name, parameter in named.items() if parameter.grad is not None}
        parameters = list[Tensor](learnt.values())
        moves = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.clip is not None:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(moves)))
            torch._foreach_mul_(moves, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        if self.weight_decay:
            torch._foreach_add_(moves, parameters, alpha=self.weight_decay)
        if self.momentum:
            velocities |= {name: torch.zeros_like(parameter) for name, parameter in learnt.items() if name not in velocities}
            before = [velocities[name] for name in learnt]
            torch._foreach_mul_(before, self.momentum)
            torch._foreach_add_(before, moves)
            moves = before
        torch._foreach_add_(parameters, moves, alpha=-self.lr)
