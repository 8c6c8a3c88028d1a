"""Data impressions (DI).

Nayak, Mopuri, Shaj, Babu, Chakraborty: *Zero-Shot Knowledge Distillation in Deep Networks*, ICML 2019 (arXiv 1905.08114), and
Nayak, Mopuri, Jain, Chakraborty: *Mining Data Impressions from Deep Models as Substitute for the Unavailable Training Data*, TPAMI 2021
(arXiv 2101.06069).

Differences from the text: images stay in [0, 1] by projection after every step (the text leaves the range open), and concentrations are
kept >= 1e-4, since a Dirichlet distribution needs them positive while the min-max scaling makes the least one zero.

The sampler of the targets makes the method: :class:`~fedimpr.synthesis.targets.ClassSimilarity` for data impressions,
:class:`~fedimpr.synthesis.targets.OneHot` for class impressions, and :class:`~fedimpr.synthesis.targets.FeatureGaussian`, with an
activation prior, for soft-targeted transfer sets (Wang, AAAI 2021).

``variant="as_released"`` follows the authors' code where it departs from the text: each (beta, class) row starts from one noise batch,
which all further batches of the row go on from, with one optimiser for everything; the whole batch is rescaled to [0, 1] by its extremes
in every step. The code's targets are those of ``ClassSimilarity(scaling="rows")``. It draws rotations and scales for ``views`` and never
applies them; the published settings have still views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.impressions import Impressions
from fedimpr.observation import frozen
from fedimpr.synthesis.base import Progress, classes_of, finished, require, silent
from fedimpr.synthesis.descent import Diverged, Mined, Told, descend, mine_batches
from fedimpr.synthesis.priors import Priors
from fedimpr.synthesis.targets import TargetSampler
from fedimpr.views import Views


@dataclass(kw_only=True)
class DataImpressions:
    """Optimise noise until the teacher's softened output is a target drawn from a distribution that the teacher itself describes.

    Attributes:
        targets: draws the targets.
        priors: weights of the loss.
        temperature: tau of the teacher's softmax, in the synthesis and in the stored targets.
        steps: Adam steps per batch.
        lr: Adam's learning rate, in units of the pixel range [0, 1].
        batch_size: images optimised together.
        variant: ``"text"`` or ``"as_released"`` (see the module's text).
        brightness: images start as uniform noise in [0, ``brightness``], in (0, 1]; thin strokes hardly
            come out of bright noise.
        views: how images are moved before the teacher sees them in each step, so that they stay what they are when moved.
    """

    targets: TargetSampler
    priors: Priors
    temperature: float
    steps: int
    lr: float
    batch_size: int
    variant: Literal["text", "as_released"]
    brightness: float
    views: Views

    def __post_init__(self) -> None:
        require(self, above_zero=("temperature", "lr", "steps", "batch_size", "brightness"))
        if self.brightness > 1:
            raise ConfigError("brightness", self.brightness, "a number in (0, 1]")
        if self.variant not in ("text", "as_released"):
            raise ConfigError("variant", self.variant, "'text' or 'as_released'")

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
        """As :meth:`Synthesizer.synthesize`.

        Raises:
            TeacherError: the teacher lacks what the targets are drawn from, or its logits are not finite.
            Diverged: every batch diverged.
        """
        device, text = device_of(teacher), self.variant == "text"
        with frozen(teacher, student), accelerated(device):
            classes = classes_of(teacher, shape, device)
            loss = self.priors.bound(teacher, student, self.temperature)
            wanted, labels, rows = self.targets.draw(teacher, count, shape, self.temperature, generator)
            if wanted.shape[1] != classes:
                problem = f"the teacher's final layer has {wanted.shape[1]} outputs, and it answers with {classes}"
                raise TeacherError(problem, stage="synthesis", remedy="Of a model that knows classes in turns, mine in_every_turn(model).")
            if text:  # any order will do, so every batch mixes all classes
                order = torch.randperm(count, generator=generator)
                wanted, labels, rows = wanted[order], labels[order], [count]
            batches = [batch for row in torch.arange(count).split(rows) for batch in row.split(self.batch_size) if len(batch)]
            starts = {sum(rows[:r]) for r in range(len(rows))}
            random = seeds.on_device(generator, device)
            canvas, adam = self._canvas(self.batch_size, shape, device)

            def noise() -> None:
                with torch.no_grad():
                    canvas.copy_(self.brightness * torch.rand(canvas.shape, generator=random, device=device))

            def mine(batch: int, told: Told) -> Mined:
                nonlocal canvas, adam
                places = batches[batch]
                target, n = wanted[places].to(device), len(places)
                if text:
                    canvas, adam = self._canvas(n, shape, device)
                if text or int(places[0]) in starts:
                    noise()

                def terms(images: Tensor) -> dict[str, Tensor]:
                    # Summed, not averaged: then an image's path does not depend on how many others share its batch.
                    return {name: n * term for name, term in loss(self.views(images, random), target).items()}

                def project() -> None:
                    if text:
                        canvas.clamp_(0, 1)
                    else:  # the whole batch by its extremes
                        canvas.sub_(canvas.min()).div_(canvas.max().clamp_min(1e-12))

                try:
                    images = descend(lambda: canvas[:n], terms, [adam], steps=self.steps, told=told, keep="last", project=project)
                except Diverged:  # as released, the next batch would go on from what is lost
                    canvas, adam = self._canvas(self.batch_size, shape, device)
                    noise()
                    raise
                return Mined(images, labels[places].to(device))

            mined = mine_batches(len(batches), self.steps, progress, mine)
            return finished(teacher, *mined, self.temperature, count * self.steps)

    def _canvas(self, n: int, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, torch.optim.Adam]:
        canvas = torch.zeros(n, *shape, device=device).requires_grad_()
        return canvas, torch.optim.Adam([canvas], lr=self.lr)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing outlives a call."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
