"""Data impressions (DI).

Nayak, Mopuri, Shaj, Babu, Chakraborty: *Zero-Shot Knowledge Distillation in Deep Networks*, ICML 2019 (arXiv 1905.08114), and
Nayak, Mopuri, Jain, Chakraborty: *Mining Data Impressions from Deep Models as Substitute for the Unavailable Training Data*, TPAMI 2021
(arXiv 2101.06069).

Differences from the text: images stay in [0, 1] by projection after every step (the text leaves the range open), and concentrations are
kept >= 1e-4, since a Dirichlet distribution needs them positive while the min-max scaling makes the least one zero.

``variant="as_released"`` follows the authors' code where it departs from the text: similarities are scaled row by row and the scaling
factor beta has no effect; each (class, beta) row starts from one noise batch, which all further batches of the row go on from, with one
optimiser for everything; the whole batch is rescaled to [0, 1] by its extremes in every step.
It draws rotations and scales for ``views`` and never applies them; the published settings have still views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.ensemble import class_vectors
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Impressions
from fedimpr.observation import frozen
from fedimpr.synthesis.base import Progress, device_of, label, silent
from fedimpr.views import Views

LEAST_CONCENTRATION = 1e-4


def class_similarity(teacher: nn.Module) -> Tensor:
    """Cosine similarity (K, K) between the vectors that the final layer keeps for each class (ZSKD; biases left out).

    For an ensemble these are the vectors of the final layer it effectively has, over the concatenated features of all members: see
    :func:`fedimpr.ensemble.class_vectors`. A client that never saw class k thus speaks on k with as much voice as its weight in the
    ensemble gives it.
    """
    directions = F.normalize(class_vectors(teacher).double(), dim=1)
    return directions @ directions.T


def concentrations(similarity: Tensor, beta: float, variant: Literal["text", "as_released"]) -> Tensor:
    """Dirichlet concentrations (K, K); row k belongs to class k.

    ``text``: similarities scaled to [0, 1] over the whole matrix, times beta. ``as_released``: scaled row by row, whatever beta.
    """
    if variant == "text":
        low, high, factor = similarity.min(), similarity.max(), beta
    else:
        low, high, factor = similarity.min(1, keepdim=True).values, similarity.max(1, keepdim=True).values, 1.0
    return (factor * (similarity - low) / (high - low).clamp_min(1e-12)).clamp_min(LEAST_CONCENTRATION)


@dataclass(kw_only=True)
class DataImpressions:
    """Optimise noise until the teacher's softened output is a target drawn from a class-aware Dirichlet distribution.

    Attributes:
        betas: scaling factors of the concentrations; small ones give peaked targets, large ones spread. Classes and betas share the
            images evenly.
        temperature: tau of the teacher's softmax, in the synthesis and in the stored targets.
        steps: Adam steps per batch.
        lr: Adam's learning rate, in units of the pixel range [0, 1].
        batch_size: images optimised together.
        variant: ``"text"`` or ``"as_released"`` (see the module's text).
        views: how images are moved before the teacher sees them in each step, so that they stay what they are when moved.
    """

    betas: tuple[float, ...]
    temperature: float
    steps: int
    lr: float
    batch_size: int
    variant: Literal["text", "as_released"]
    views: Views

    def __post_init__(self) -> None:
        self.betas = tuple(self.betas)
        if not self.betas or min(self.betas) <= 0:
            raise ConfigError("betas", self.betas, "one or more numbers > 0")
        for key in ("temperature", "lr", "steps", "batch_size"):
            if getattr(self, key) <= 0:
                raise ConfigError(key, getattr(self, key), "a number > 0")
        if self.variant not in ("text", "as_released"):
            raise ConfigError("variant", self.variant, "'text' or 'as_released'")

    def draw_targets(self, teacher: nn.Module, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Targets (count, K), rows sum to one, and the class (count,) whose row each was drawn from, in the order of the rows.

        Row ``r`` of (class, beta) pairs gets ``count // rows`` targets; the first ``count % rows`` rows get one more.
        """
        similarity = class_similarity(teacher).cpu()
        classes = len(similarity)
        rows = torch.cat([concentrations(similarity, beta, self.variant) for beta in self.betas]).numpy()
        random = np.random.default_rng(seeds.draw_seed(generator))
        shares = [count // len(rows) + (row < count % len(rows)) for row in range(len(rows))]
        targets = np.concatenate([random.dirichlet(row, size=share) for row, share in zip(rows, shares, strict=True)])
        wanted = np.repeat(np.arange(len(rows)) % classes, shares)
        return torch.from_numpy(targets).float(), torch.from_numpy(wanted).long()

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
        """As :meth:`Synthesizer.synthesize`; the student plays no part.

        Raises:
            TeacherError: the teacher has no final linear layer, or logits that are not finite.
            FedimprError: the optimisation diverged.
        """
        device = device_of(teacher)
        with frozen(teacher):
            targets, wanted = self.draw_targets(teacher, count, generator)
            source = seeds.on_device(generator, device)
            if self.variant == "text":  # any order will do, so every batch mixes all classes
                order = torch.randperm(count, generator=generator)
                targets, wanted = targets[order], wanted[order]
                images = self._optimise_text(teacher, targets.to(device), shape, source, progress)
            else:
                images = self._optimise_as_released(teacher, targets.to(device), wanted, shape, source, progress)
            soft = label(teacher, images, self.temperature)
        if not bool(images.isfinite().all()):
            raise FedimprError("data impressions diverged", stage="synthesis", value=self.lr, remedy="Lower the learning rate.")
        return Impressions(images, soft, wanted.to(device), teacher_passes=count * (self.steps + 1))

    def _optimise_text(
        self, teacher: nn.Module, targets: Tensor, shape: tuple[int, int, int], generator: torch.Generator, progress: Progress
    ) -> Tensor:
        batches = targets.split(self.batch_size)
        done = []
        for b, wanted in enumerate(batches):
            x = torch.rand(len(wanted), *shape, generator=generator, device=targets.device).requires_grad_()
            adam = torch.optim.Adam([x], lr=self.lr)
            for step in range(self.steps):
                loss = self._step(teacher, x, wanted, adam, generator)
                with torch.no_grad():
                    x.clamp_(0, 1)
                progress("mining", b * self.steps + step + 1, len(batches) * self.steps, loss=loss)
            done.append(x.detach())
        return torch.cat(done)

    def _optimise_as_released(
        self,
        teacher: nn.Module,
        targets: Tensor,
        wanted: Tensor,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        progress: Progress,
    ) -> Tensor:
        row_ends = [0, *(torch.nonzero(wanted.diff()).flatten() + 1).tolist(), len(wanted)]
        batches = [part for a, b in zip(row_ends, row_ends[1:], strict=False) for part in targets[a:b].split(self.batch_size)]
        starts = {sum(len(part) for part in batches[:i]) for i in range(len(batches))} & set(row_ends)
        x = torch.zeros(self.batch_size, *shape, device=targets.device).requires_grad_()
        adam = torch.optim.Adam([x], lr=self.lr)  # one for all: its moments are never reset
        done: list[Tensor] = []
        at = 0
        for b, part in enumerate(batches):
            with torch.no_grad():
                if at in starts:
                    x.copy_(torch.rand(x.shape, generator=generator, device=x.device))
            for step in range(self.steps):
                loss = self._step(teacher, x, part, adam, generator)
                with torch.no_grad():
                    x.sub_(x.min()).div_(x.max().clamp_min(1e-12))
                progress("mining", b * self.steps + step + 1, len(batches) * self.steps, loss=loss)
            done.append(x.detach()[: len(part)].clone())
            at += len(part)
        return torch.cat(done)

    def _step(self, teacher: nn.Module, x: Tensor, targets: Tensor, adam: torch.optim.Optimizer, generator: torch.Generator) -> Tensor:
        # Summed, not averaged: then an image's path does not depend on how many others share its batch.
        loss = F.cross_entropy(teacher(self.views(x[: len(targets)], generator)) / self.temperature, targets, reduction="sum")
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach() / len(targets)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing outlives a call."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
