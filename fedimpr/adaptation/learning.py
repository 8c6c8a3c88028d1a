"""A target client's turn: a model learns from images of a domain without labels, and from what came along with it.

The loop is the same for all methods, so that they are compared at one budget; a method says what a step's loss is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.adaptation.batch_norm import reestimate
from fedimpr.devices import device_of
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.observation import batch_norm_layers, frozen
from fedimpr.synthesis.base import require
from fedimpr.views import Views

STAGE = "adaptation"

Need = Literal["impressions", "sources", "labels"]


@dataclass(frozen=True)
class SourceImpressions:
    """Impressions of M source models, in place of the sources' labelled images.

    Attributes:
        pixels: uint8, (N, C, H, W).
        targets: (N, K), what its source model answers for each; rows sum to one.
        origins: int64, (N,), the source model that each was mined from, in [0, M).
    """

    pixels: Tensor
    targets: Tensor
    origins: Tensor

    def sample(self, count: int, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, C, H, W) in [0, 1] and their targets (count, K): a source by its weight, (M,), then one of its impressions."""
        held = torch.bincount(self.origins, minlength=len(weights))
        chances = (weights / held.clamp_min(1))[self.origins]
        places = torch.multinomial(chances, count, replacement=True, generator=generator)
        return self.pixels[places].float() / 255, self.targets[places]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a target client has beside its model and its images; a method gets what it needs and finds the rest empty.

    Attributes:
        weights: (M,), how useful the sources are, >= 0, sum 1.
        impressions: of the source models.
        sources: the M source models, in eval mode and without gradients; they are left as they are.
        labels: int64, (N,), of the client's own images: for an upper reference that breaks the rule, and for nobody else.
    """

    weights: Tensor
    impressions: SourceImpressions | None = None
    sources: Sequence[nn.Module] = ()
    labels: Tensor | None = None


class Bound(Protocol):
    """A method at work on one model and one client's images."""

    def parameters(self) -> list[nn.Parameter]:
        """What learns: parameters of the model, and of what the method has beside it."""
        ...

    def before_pass(self) -> None:
        """Called before each pass over the client's images."""
        ...

    def loss(self, images: Tensor, places: Tensor, progress: float) -> Tensor:
        """The loss of a step, a scalar.

        Args:
            images: (N, C, H, W) in [0, 1], views of the client's images, on the model's device.
            places: (N,), which of them.
            progress: the share of the turn that is done, in [0, 1).
        """
        ...


class Method(Protocol):
    """A way to learn without labels; its fields are its hyper-parameters and have no defaults."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it must be given beside model and images."""
        ...

    def bound(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> Bound:
        """The method at work.

        Args:
            model: in training mode; it starts as the sources left it.
            pixels: uint8, (N, C, H, W), all images of the client.
            given: with all that it needs.
            generator: the source of all randomness.
        """
        ...


class Adaptation(Protocol):
    """A target client's whole turn: :class:`TargetTraining`, or something simpler."""

    @property
    def needs(self) -> frozenset[Need]:
        """What :class:`Given` must hold."""
        ...

    def check(self, model: nn.Module) -> None:
        """Refuse a model that it cannot adapt.

        Raises:
            ConfigError: with the reason.
        """
        ...

    def __call__(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> dict[str, float]:
        """Adapt ``model`` in place to images uint8 (N, C, H, W); return what is worth knowing about it."""
        ...


@dataclass(frozen=True, kw_only=True)
class TargetTraining:
    """SGD with Nesterov momentum; the learning rate falls to zero along a cosine within a turn.

    Attributes:
        steps: optimiser steps of a turn.
        batch_size: of the client's own images; a client with fewer takes all of them in each step. As many impressions come on top.
        lr: at the first step.
        momentum: in (0, 1).
        weight_decay: >= 0.
        clip: largest norm of a step's gradient.
        views: augmentation of the client's images.
        method: what a step learns.
    """

    steps: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    clip: float
    views: Views
    method: Method

    def __post_init__(self) -> None:
        require(self, above_zero=("steps", "lr", "clip"), at_least_zero=("weight_decay",))
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2")
        if not 0 < self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "a number in (0, 1)")

    @property
    def needs(self) -> frozenset[Need]:
        """What the method needs."""
        return self.method.needs

    def check(self, model: nn.Module) -> None:
        """Any model will do."""

    def __call__(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> dict[str, float]:
        """Train ``model`` in place and leave it in eval mode; return ``{"loss": mean over the turn}``.

        Raises:
            FedimprError: there are fewer than two images, something that the method needs is missing, or the loss is not finite.
        """
        _check(self, pixels, given)
        device = device_of(model)
        model.train()
        bound = self.method.bound(model, pixels, given, generator)
        learning = bound.parameters()
        sgd = torch.optim.SGD(learning, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.steps)
        total = torch.zeros((), device=device)
        with seeds.isolated(seeds.draw_seed(generator)):  # for models with dropout
            for step, (begins, places) in enumerate(batches(len(pixels), self.batch_size, self.steps, generator)):
                if begins:
                    bound.before_pass()
                images = self.views(pixels[places].to(device).float() / 255, generator)
                loss = bound.loss(images, places, step / self.steps)
                sgd.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(learning, self.clip)
                sgd.step()
                cosine.step()
                total += loss.detach()
        model.eval()
        mean = float(total) / self.steps
        if not abs(mean) < float("inf"):
            raise FedimprError("the loss is not finite", stage=STAGE, value=mean, remedy="Lower the method's lr.")
        return {"loss": mean}


@dataclass(frozen=True, kw_only=True)
class TargetStatistics:
    """Nothing is learnt: the batch-norm layers see the client's images, see :func:`fedimpr.adaptation.reestimate`.

    Attributes:
        batch_size: the more the better.
        momentum: of the newest batch, in (0, 1]; ``None`` forgets the source's statistics.
    """

    batch_size: int
    momentum: float | None

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise ConfigError("momentum", self.momentum, "null or a number in (0, 1]")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    def check(self, model: nn.Module) -> None:
        """Refuse a model without batch norm.

        Raises:
            ConfigError: it keeps no statistics.
        """
        if not batch_norm_layers(model):
            raise ConfigError("model", type(model).__name__, "one with batch norm: there are no statistics to take from the target")

    def __call__(self, model: nn.Module, pixels: Tensor, given: Given, generator: torch.Generator) -> dict[str, float]:
        """Re-estimate in place; the images as they are.

        Raises:
            FedimprError: there are fewer than two images.
            TeacherError: as :func:`fedimpr.adaptation.reestimate`.
        """
        _check(self, pixels, given)
        order = torch.randperm(len(pixels), generator=generator)
        reestimate(model, (pixels[part].float() / 255 for part in whole(order, self.batch_size)), momentum=self.momentum)
        model.eval()
        return {}


def batches(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[tuple[bool, Tensor]]:
    """``steps`` batches of places in [0, count), each with whether a new pass over all begins with it.

    A pass is a random order; what is left of it below a whole batch is left out. Fewer places than a batch are one batch.
    """
    size, left = min(batch_size, count), list[Tensor]()
    for _ in range(steps):
        begins = not left
        if begins:
            order = torch.randperm(count, generator=generator)
            left = list(order[: count - count % size].split(size))
        yield begins, left.pop(0)


def whole(places: Tensor, batch_size: int) -> list[Tensor]:
    """Places cut into batches; a last one of a single image goes to the one before it, as batch norm cannot use it."""
    parts = list(places.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@torch.no_grad()
def predictions(model: nn.Module, pixels: Tensor, batch_size: int = 500) -> Tensor:
    """The softmax (N, K) of a model in eval mode for images uint8 (N, C, H, W), on the CPU; the model is left as it was."""
    with frozen(model):
        return torch.cat([model(part.to(device_of(model)).float() / 255).softmax(1).cpu() for part in pixels.split(batch_size)])


def _check(adaptation: Adaptation, pixels: Tensor, given: Given) -> None:
    if len(pixels) < 2:
        raise FedimprError(
            "a target client needs two images or more", stage=STAGE, value=len(pixels), remedy="Leave it out of the targets."
        )
    held = {"impressions": given.impressions is not None, "sources": bool(given.sources), "labels": given.labels is not None}
    for need in sorted(adaptation.needs):
        if not held[need]:
            raise FedimprError(f"the method needs {need}, and there are none", stage=STAGE)
