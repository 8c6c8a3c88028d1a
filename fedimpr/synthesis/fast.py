"""FastDFKD: inversion in a few steps from a start that all batches share.

Fang, Mo, Wang, Song, Bei, Zhang, Song: *Up to 100x Faster Data-Free Knowledge Distillation*, AAAI 2022 (arXiv 2112.06253).

Differences: the authors' code starts the generator's first layers anew once, late in a run; that is left out. Its first calls, in which it
makes images without looking at the student, are ``mining.before``. As in that code, a batch keeps the images of its best step, the
gradients of all inner steps are summed (FOMAML), and the meta-optimiser's learning rates are the inner ones times the number of steps.

The code for CIFAR draws new latents for every batch and shares the generator alone; that for ImageNet learns where the latents start,
too, one for each place in a batch. Both are here: ``latents="fresh"`` and ``latents="meta"``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of, placed
from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.observation import frozen, observe
from fedimpr.synthesis.base import Progress, classes_of, finished, require, silent
from fedimpr.synthesis.descent import Mined, Steps, Told, descend, mine_batches
from fedimpr.synthesis.generator import Generator
from fedimpr.synthesis.priors import Priors
from fedimpr.synthesis.state import MovingStatistics, Trained
from fedimpr.views import Views

BETAS = (0.5, 0.999)
REPTILE = 67.0  # the authors' factor on Reptile's gradient; Adam all but cancels it


class Start(nn.Module):
    """What every batch starts from: a generator and, where they are learned, latents (N, Z).

    Args:
        generator: the meta-generator.
        latents: the meta-latents, or ``None``.
    """

    def __init__(self, generator: Generator, latents: Tensor | None) -> None:
        super().__init__()
        self.generator = generator
        self.latents = None if latents is None else nn.Parameter(latents)


class Gathered:
    """Sums the gradients of a copy's steps into those of its original (FOMAML); stands among the copy's optimisers.

    Args:
        original: whose gradients grow.
        copied: a copy of it, whose gradients are there after each backward pass.
    """

    def __init__(self, original: nn.Module, copied: nn.Module) -> None:
        self.pairs = list(zip(original.parameters(), copied.parameters(), strict=True))

    def zero_grad(self) -> None:
        """Nothing is forgotten before the batch is done."""

    def step(self) -> None:
        """Add the copy's gradients."""
        for original, copied in self.pairs:
            assert copied.grad is not None
            original.grad = copied.grad.clone() if original.grad is None else original.grad.add_(copied.grad)


def toward(original: nn.Module, copied: nn.Module) -> None:
    """Set the original's gradients so that a step down them leads toward the copy (Reptile)."""
    with torch.no_grad():
        for here, there in zip(original.parameters(), copied.parameters(), strict=True):
            here.grad = REPTILE * (here - there)


@dataclass(kw_only=True)
class FastMetaInversion:
    """Adapt a copy of a shared generator to each batch in a few steps, and learn the generator that such steps best start from.

    Attributes:
        priors: weights of the inversion loss.
        meta: how the start learns from a batch: ``"fomaml"``, from the gradients of its steps, or ``"reptile"``, from where they led.
        latents: ``"fresh"``, drawn for every batch, or ``"meta"``, learned and shared like the generator.
        latent: size Z of a latent.
        width: channels of the generator.
        steps: inner Adam steps per batch.
        lr: inner learning rate of the generator; its meta-optimiser's is ``steps`` times that.
        latent_lr: inner learning rate of the latents; likewise.
        momentum: share of earlier batches in the statistics that are matched, in [0, 1); see
            :class:`~fedimpr.synthesis.state.MovingStatistics`.
        batch_size: images optimised together.
        temperature: of the stored soft targets.
        views: how images are moved before teacher and student see them in each step.
    """

    priors: Priors
    meta: Literal["fomaml", "reptile"]
    latents: Literal["fresh", "meta"]
    latent: int
    width: int
    steps: int
    lr: float
    latent_lr: float
    momentum: float
    batch_size: int
    temperature: float
    views: Views

    def __post_init__(self) -> None:
        require(self, above_zero=("latent", "width", "steps", "lr", "latent_lr", "temperature"))
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2, since the generator normalises over the batch")
        if self.meta not in ("fomaml", "reptile"):
            raise ConfigError("meta", self.meta, "'fomaml' or 'reptile'")
        if self.latents not in ("fresh", "meta"):
            raise ConfigError("latents", self.latents, "'fresh' or 'meta'")
        self._start = Trained()
        self._statistics = MovingStatistics(self.momentum)

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
        device, n = device_of(teacher), self.batch_size
        with frozen(teacher, student), accelerated(device):
            classes = classes_of(teacher, shape, device)
            loss = self.priors.bound(teacher, student)
            with seeds.isolated(seeds.draw_seed(generator)):
                network = Generator(self.latent, self.width, shape)
                fresh = placed(Start(network, torch.randn(n, self.latent) if self.latents == "meta" else None), device)
            start, meta = self._start.resumed(fresh, lambda _: self._adam(fresh.generator.parameters(), fresh.latents, self.steps))
            random = seeds.on_device(generator, device)

            def mine(batch: int, told: Told) -> Mined:
                labels = torch.randint(classes, (n,), generator=generator).to(device)
                copied = copy.deepcopy(start)
                drawn = torch.randn(n, self.latent, generator=random, device=device).requires_grad_()
                latents = drawn if copied.latents is None else copied.latents
                optimisers: list[Steps] = [self._adam(copied.generator.parameters(), latents, 1)]
                if self.meta == "fomaml":
                    optimisers.append(Gathered(start, copied))
                meta.zero_grad()

                def terms(images: Tensor) -> dict[str, Tensor]:
                    views = self.views(images, random)
                    seen = observe(teacher, views, statistics=loss.statistics, features=loss.features)
                    return loss.of(views, self._statistics.mixed(seen), labels)

                with self._start.protected(self.steps):
                    images = descend(lambda: copied.generator(latents), terms, optimisers, steps=self.steps, told=told, keep="best")
                    if self.meta == "reptile":
                        toward(start, copied)
                    meta.step()
                self._statistics.advance()
                return Mined(images, labels)

            batches = -(-count // n)
            images, labels = mine_batches(batches, self.steps, progress, mine)
            return finished(teacher, images[:count], labels[:count], self.temperature, batches * n * self.steps)

    def _adam(self, weights: Iterable[Tensor], latents: Tensor | None, times: int) -> torch.optim.Adam:
        """Adam for a generator's weights and the latents, at ``times`` their inner learning rates."""
        groups = [{"params": list(weights), "lr": times * self.lr}]
        if latents is not None:
            groups.append({"params": [latents], "lr": times * self.latent_lr})
        return torch.optim.Adam(groups, betas=BETAS)

    def state_dict(self) -> dict[str, Tensor]:
        """The shared start, its optimiser and the average of the statistics; empty before the first call."""
        start = {f"start.{key}": value for key, value in self._start.state_dict().items()}
        return {**start, **{f"statistics.{key}": value for key, value in self._statistics.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._start.load_state_dict({key[6:]: value for key, value in state.items() if key.startswith("start.")})
        self._statistics.load_state_dict({key[11:]: value for key, value in state.items() if key.startswith("statistics.")})
