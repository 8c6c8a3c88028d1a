"""Contrastive model inversion (CMI).

Fang, Song, Wang, Shen, Wang, Song: *Contrastive Model Inversion for Data-Free Knowledge Distillation*, IJCAI 2021 (arXiv 2105.08584).

Differences: the text takes the batch-norm term and instance features from batch-norm layers. Where the teacher has none, the batch-norm
term is dropped with a logged note, and instance features can be taken from the input of the final layer (``features: penultimate``).
Local views keep the aspect ratio of the image. The bank keeps features on the device. The projection head's hidden layer is bounded.
For an ensemble the batch-norm term is the mean over its members, and features are concatenated. As in the authors' code, a batch keeps
the images of its best step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of, placed
from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.observation import Features, batch_norm_layers, frozen, observe
from fedimpr.synthesis.base import Progress, classes_of, finished, require, silent
from fedimpr.synthesis.descent import Mined, Told, descend, mine_batches
from fedimpr.synthesis.generator import Generator, ProjectionHead
from fedimpr.synthesis.priors import Priors, instance_contrast
from fedimpr.synthesis.state import Trained
from fedimpr.views import Views

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ContrastiveModelInversion:
    """Optimise latents and a fresh generator per batch so that the teacher sees certain, typical and mutually distinct images.

    Attributes:
        latent: size Z of a latent.
        width: channels of the generator.
        steps: Adam steps per batch.
        lr: learning rate of generator, latents and head.
        batch_size: images optimised together.
        priors: weights of the inversion loss, which global views alone are judged by.
        contrastive_weight: of the instance contrast.
        contrast_temperature: tau of the instance contrast.
        features: instance features, ``"batch_norm"`` or ``"penultimate"`` (see :func:`fedimpr.observation.observe`).
        hidden: units of the projection head's hidden layer, at most as many as there are features. It bounds the head, whose size would
            otherwise grow with the square of an ensemble's members.
        projection: size D of a projected feature.
        memory: how many instances' features the memory bank keeps, first in, first out.
        negatives: how many of them are drawn at random in each step.
        temperature: of the stored soft targets.
        global_view: the distribution of global views.
        local_view: the distribution of local views.
    """

    latent: int
    width: int
    steps: int
    lr: float
    batch_size: int
    priors: Priors
    contrastive_weight: float
    contrast_temperature: float
    features: Features
    hidden: int
    projection: int
    memory: int
    negatives: int
    temperature: float
    global_view: Views
    local_view: Views

    def __post_init__(self) -> None:
        positive = ("latent", "width", "steps", "lr", "contrast_temperature", "hidden", "projection", "memory", "temperature")
        require(self, above_zero=positive, at_least_zero=("contrastive_weight", "negatives"))
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2, since the generator normalises over the batch")
        if self.features not in ("batch_norm", "penultimate"):
            raise ConfigError("features", self.features, "'batch_norm' or 'penultimate'")
        if self.priors.activation > 0 and self.features == "batch_norm" and self.contrastive_weight > 0:
            raise ConfigError(
                "priors.activation", self.priors.activation, "0, or features='penultimate', which the contrast then uses, too"
            )
        self._head = Trained()
        self._memory: Tensor | None = None  # (B, 2, F): local and global features, the oldest first
        self._noted = False

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
            TeacherError: ``features`` is ``"penultimate"`` and the teacher has no final linear layer, or its logits are not finite.
            Diverged: every batch diverged.
        """
        device, n = device_of(teacher), self.batch_size
        contrasted = self._can_contrast(teacher)
        with frozen(teacher, student), accelerated(device):
            classes = classes_of(teacher, shape, device)
            loss = self.priors.bound(teacher, student)
            random = seeds.on_device(generator, device)

            def mine(batch: int, told: Told) -> Mined:
                labels = torch.randint(classes, (n,), generator=generator).to(device)
                with seeds.isolated(seeds.draw_seed(generator)):
                    network = placed(Generator(self.latent, self.width, shape), device)
                latents = torch.randn(n, self.latent, generator=random, device=device).requires_grad_()
                optimisers: list[torch.optim.Optimizer] = [
                    torch.optim.Adam([latents, *network.parameters()], lr=self.lr, betas=(0.5, 0.999))
                ]
                if contrasted:
                    head, of_head = self._head_for(teacher, shape, generator)
                    optimisers.append(of_head)

                def terms(images: Tensor) -> dict[str, Tensor]:
                    views = self.global_view(images, random)
                    if not contrasted:
                        return loss(views, labels)
                    both = torch.cat([views, self.local_view(images, random)])  # one pass through the teacher for both views
                    seen = observe(teacher, both, statistics=loss.statistics, features=self.features, counted=n)
                    contrast = self._contrast(head, seen.features[n:], seen.features[:n], generator)
                    return {**loss.of(views, seen, labels), "contrastive": self.contrastive_weight * contrast}

                with self._head.protected(self.steps) if contrasted else nullcontext():
                    images = descend(lambda: network(latents), terms, optimisers, steps=self.steps, told=told, keep="best")
                if contrasted:
                    both = torch.cat([self.local_view(images, random), self.global_view(images, random)])
                    with torch.no_grad():
                        local, global_ = observe(teacher, both, features=self.features).features.split(n)
                    self._remember(torch.stack([local, global_], 1))
                return Mined(images, labels)

            batches = -(-count // n)
            images, labels = mine_batches(batches, self.steps, progress, mine)
            passes = batches * n * (2 if contrasted else 1) * self.steps
            return finished(teacher, images[:count], labels[:count], self.temperature, passes)

    def _can_contrast(self, teacher: nn.Module) -> bool:
        if self.contrastive_weight > 0 and self.features == "batch_norm" and not batch_norm_layers(teacher):
            if not self._noted:
                self._noted = True
                reason = "the teacher has no batch norm to take features from"
                log.warning("the contrastive term (weight %g) is dropped: %s", self.contrastive_weight, reason)
            return False
        return self.contrastive_weight > 0

    def _contrast(self, head: ProjectionHead, local: Tensor, global_: Tensor, generator: torch.Generator) -> Tensor:
        memory = self._memory
        assert memory is not None
        banked = memory[torch.randperm(len(memory), generator=generator)[: self.negatives].to(local.device)]
        return instance_contrast(
            head(torch.cat([local, banked[:, 0]])), head(torch.cat([global_, banked[:, 1]])), len(local), self.contrast_temperature
        )

    def _head_for(
        self, teacher: nn.Module, shape: tuple[int, int, int], generator: torch.Generator
    ) -> tuple[ProjectionHead, torch.optim.Optimizer]:
        """The projection head for the teacher's features; head and memory start anew where those have another size than before."""
        device = device_of(teacher)
        with torch.no_grad():
            features = observe(teacher, torch.zeros(1, *shape, device=device), features=self.features).features
        size = features.shape[1]
        with seeds.isolated(seeds.draw_seed(generator)):
            fresh = ProjectionHead(size, self.hidden, self.projection).to(device)
        if self._memory is None or self._memory.shape[2] != size:
            if self._memory is not None:
                log.info("the teacher's features changed size; projection head and memory start anew")
            self._memory = features.new_zeros(0, 2, size)
        self._memory = self._memory.to(device)
        return self._head.resumed(fresh, lambda parameters: torch.optim.Adam(parameters, lr=self.lr))

    def _remember(self, features: Tensor) -> None:
        assert self._memory is not None
        self._memory = torch.cat([self._memory, features.detach()])[-self.memory :]

    def state_dict(self) -> dict[str, Tensor]:
        """Projection head, its optimiser and the memory; empty before the first contrast."""
        if self._memory is None:
            return {}
        return {**{f"head.{key}": value for key, value in self._head.state_dict().items()}, "memory": self._memory.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._head.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith("head.")})
        self._memory = state["memory"].clone() if "memory" in state else None
