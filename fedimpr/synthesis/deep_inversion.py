"""DeepInversion and its adaptive form (ADI).

Yin, Molchanov, Li, Alvarez, Mallya, Hoiem, Jha, Kautz: *Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion*, CVPR 2020
(arXiv 1912.08795).

Differences: pixels are optimised in [0, 1] and not in the teacher's normalised units, so published learning rates and the weights of total
variation and norm are those of the yaml times or over the pixels' standard deviation, about 0.2. As in the authors' code, a batch keeps
the images of its best step. With an adversarial weight (form ``js``) and a student it is ADI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of
from fedimpr.impressions import Impressions
from fedimpr.observation import frozen
from fedimpr.synthesis.base import Progress, classes_of, finished, require, silent
from fedimpr.synthesis.descent import Mined, Told, descend, mine_batches
from fedimpr.synthesis.priors import Priors
from fedimpr.views import Views


@dataclass(kw_only=True)
class DeepInversion:
    """Optimise noise until the teacher is certain of a class and its batch-norm layers see what they saw in training.

    Attributes:
        priors: weights of the loss.
        steps: Adam steps per batch.
        lr: Adam's learning rate, in units of the pixel range [0, 1].
        batch_size: images optimised together.
        noise: standard deviation of the noise around 0.5 that a batch starts from.
        temperature: of the stored soft targets.
        views: jitter: how images are moved before teacher and student see them in each step.
    """

    priors: Priors
    steps: int
    lr: float
    batch_size: int
    noise: float
    temperature: float
    views: Views

    def __post_init__(self) -> None:
        require(self, above_zero=("steps", "lr", "batch_size", "noise", "temperature"))

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
        """As :meth:`Synthesizer.synthesize`. Whole batches are optimised; the last one may be cut to reach ``count``.

        Raises:
            TeacherError: the teacher's logits are not finite.
            Diverged: every batch diverged.
        """
        device = device_of(teacher)
        with frozen(teacher, student), accelerated(device):
            classes = classes_of(teacher, shape, device)
            loss = self.priors.bound(teacher, student)
            random = seeds.on_device(generator, device)

            def mine(batch: int, told: Told) -> Mined:
                labels = torch.randint(classes, (self.batch_size,), generator=generator).to(device)
                noise = torch.randn(self.batch_size, *shape, generator=random, device=device)
                x = (0.5 + self.noise * noise).clamp(0, 1).requires_grad_()
                adam = torch.optim.Adam([x], lr=self.lr, betas=(0.5, 0.9))

                def terms(images: Tensor) -> dict[str, Tensor]:
                    return loss(self.views(images, random), labels)

                def project() -> None:
                    x.clamp_(0, 1)

                return Mined(descend(lambda: x, terms, [adam], steps=self.steps, told=told, keep="best", project=project), labels)

            batches = -(-count // self.batch_size)
            images, labels = mine_batches(batches, self.steps, progress, mine)
            return finished(teacher, images[:count], labels[:count], self.temperature, batches * self.batch_size * self.steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing outlives a call."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
