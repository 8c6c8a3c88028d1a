"""SpaceshipNet's images: mined ones, and ones made by exchanging channels between the generator's features of two of them.

Yu, Chen, Han, Jiang: *Data-Free Knowledge Distillation via Feature Exchange and Activation Region Constraint*, CVPR 2023.

Differences: the authors' code banks features at each of the generator's stages and decodes them, exchanged or not, whenever the student
learns, with the generator as it then is. Here a batch's features are exchanged and decoded when they are mined, so that impressions stay
images; its other images are the mined ones. A pair shares its batch, not a shuffle of all batches. The activation region constraint, on the
student's class activation maps, is left out: it belongs to the distillation objective. The generator's weights start as CMI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of, placed
from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.observation import frozen
from fedimpr.synthesis.base import Progress, classes_of, finished, require, silent
from fedimpr.synthesis.descent import Mined, Told, descend, mine_batches
from fedimpr.synthesis.generator import Generator
from fedimpr.synthesis.priors import Priors
from fedimpr.synthesis.state import Trained
from fedimpr.views import Views

UNASKED = -1  # the label of an image that no class was asked of, until the teacher has decided


def exchange(features: Tensor, generator: torch.Generator) -> Tensor:
    """Features (N, C, H, W) with a random half of each image's channels taken from its partner, the image at place N - 1 - i."""
    n, channels = features.shape[:2]
    taken = torch.rand(n, channels, generator=generator, device=features.device).argsort(1) < channels // 2
    return torch.where(taken[:, :, None, None], features.flip(0), features)


@dataclass(kw_only=True)
class ChannelExchange:
    """Train one generator batch after batch, keep each batch's best images, and exchange channels between the features of a share of them.

    Attributes:
        priors: weights of the inversion loss.
        latent: size Z of a latent; latents are drawn for every batch and not optimised.
        width: channels of the generator.
        steps: Adam steps per batch.
        lr: Adam's learning rate.
        batch_size: images optimised together.
        exchanged: share of a batch's images that are decoded from exchanged features, in [0, 1].
        temperature: of the stored soft targets.
        views: how images are moved before teacher and student see them in each step.
    """

    priors: Priors
    latent: int
    width: int
    steps: int
    lr: float
    batch_size: int
    exchanged: float
    temperature: float
    views: Views

    def __post_init__(self) -> None:
        require(self, above_zero=("latent", "width", "steps", "lr", "temperature"))
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2, since the generator normalises over the batch")
        if not 0 <= self.exchanged <= 1:
            raise ConfigError("exchanged", self.exchanged, "a number in [0, 1]")
        self._generator = Trained()

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

        The label of an exchanged image is the teacher's decision, since no class was asked of it.

        Raises:
            TeacherError: the teacher's logits are not finite.
            Diverged: every batch diverged.
        """
        device, n = device_of(teacher), self.batch_size
        with frozen(teacher, student), accelerated(device):
            classes = classes_of(teacher, shape, device)
            loss = self.priors.bound(teacher, student)
            with seeds.isolated(seeds.draw_seed(generator)):
                fresh = placed(Generator(self.latent, self.width, shape), device)
            network, adam = self._generator.resumed(fresh, lambda parameters: torch.optim.Adam(parameters, self.lr, betas=(0.5, 0.999)))
            random = seeds.on_device(generator, device)

            def mine(batch: int, told: Told) -> Mined:
                labels = (torch.randperm(n, generator=generator) % classes).to(device)
                latents = torch.randn(n, self.latent, generator=random, device=device)
                stage = 1 + int(torch.randint(len(network.stages), (), generator=generator))
                now, best = latents, latents
                least = torch.full((), torch.inf, device=device)

                def draw() -> Tensor:
                    nonlocal now
                    found = network.features(latents)
                    now = found[stage - 1].detach()
                    return network.finish(found[-1], len(found))

                def terms(images: Tensor) -> dict[str, Tensor]:
                    return loss(self.views(images, random), labels)

                def follow(step: int, value: Tensor) -> None:
                    """Keep the features of the step whose images ``descend`` keeps."""
                    nonlocal best, least
                    better = value < least
                    best, least = now if step == 1 else torch.where(better, now, best), torch.where(better, value, least)
                    told(step, value)

                with self._generator.protected(self.steps):
                    images = descend(draw, terms, [adam], steps=self.steps, told=follow, keep="best")
                    adam.state.clear()  # every batch starts with a new Adam
                network.eval()
                with torch.no_grad():
                    decoded = network.finish(exchange(best, random), stage)
                network.train()
                chosen = torch.rand(n, generator=random, device=device).argsort() < round(self.exchanged * n)
                return Mined(torch.where(chosen[:, None, None, None], decoded, images), torch.where(chosen, UNASKED, labels))

            batches = -(-count // n)
            images, labels = mine_batches(batches, self.steps, progress, mine)
            made = finished(teacher, images[:count], labels[:count], self.temperature, batches * n * self.steps)
            return replace(made, labels=torch.where(made.labels == UNASKED, made.targets.argmax(1), made.labels))

    def state_dict(self) -> dict[str, Tensor]:
        """The generator; empty before the first call."""
        return self._generator.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._generator.load_state_dict(state)
