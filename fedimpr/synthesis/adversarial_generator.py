"""One generator plays against the student: DAFL, ZSKT, DFQ and DFAD.

The loop is one; the objective, a :class:`~fedimpr.synthesis.priors.Priors`, is what differs:

* DAFL: Chen et al., *Data-Free Learning of Student Networks*, ICCV 2019: confidence, balance and activation.
* ZSKT: Micaelli and Storkey, *Zero-shot Knowledge Transfer via Adversarial Belief Matching*, NeurIPS 2019: KL to the student.
* DFQ: Choi et al., *Data-Free Network Quantization With Adversarial Knowledge Distillation*, CVPR Workshops 2020: batch-norm divergence,
  entropy, balance and KL to the student.
* DFAD: Fang et al., *Data-Free Adversarial Distillation*, 2019 (arXiv 1912.11006): absolute difference of the logits to the student's.

The generator outlives the call. One call takes its steps and then draws the images that the student learns from until the next call, so
the methods' alternation is ``mining.portions``, and a bank of one portion forgets images as they do.

Differences: the generator is CMI's. ZSKT's attention term in the student's loss is left out, since it needs equal feature maps. DFQ's
optional ensembles of generators and students are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of, placed
from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.observation import frozen
from fedimpr.synthesis.base import Progress, classes_of, finished, require, silent
from fedimpr.synthesis.descent import descend
from fedimpr.synthesis.generator import Generator
from fedimpr.synthesis.priors import Priors
from fedimpr.synthesis.state import Trained


@dataclass(kw_only=True)
class AdversarialGenerator:
    """Move a generator to where its objective is least; then draw impressions from it.

    Attributes:
        priors: weights of the objective.
        latent: size Z of a latent.
        width: channels of the generator.
        steps: Adam steps per call.
        lr: Adam's learning rate.
        batch_size: images per step.
        temperature: of the stored soft targets.
    """

    priors: Priors
    latent: int
    width: int
    steps: int
    lr: float
    batch_size: int
    temperature: float

    def __post_init__(self) -> None:
        require(self, above_zero=("latent", "width", "steps", "lr", "temperature"))
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2, since the generator normalises over the batch")
        if self.priors.target > 0:
            raise ConfigError("priors.target", self.priors.target, "0: nothing is wanted of a latent; see confidence")
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
        """As :meth:`Synthesizer.synthesize`. The label of an image is the teacher's decision, since no class is asked for.

        Raises:
            TeacherError: the teacher's logits are not finite.
            Diverged: a term was not finite; the generator is what it was before the call.
        """
        device = device_of(teacher)
        with frozen(teacher, student), accelerated(device):
            classes_of(teacher, shape, device)
            loss = self.priors.bound(teacher, student)
            with seeds.isolated(seeds.draw_seed(generator)):
                fresh = placed(Generator(self.latent, self.width, shape), device)
            network, adam = self._generator.resumed(fresh, lambda parameters: torch.optim.Adam(parameters, self.lr, betas=(0.5, 0.999)))
            random = seeds.on_device(generator, device)

            def draw(n: int = self.batch_size) -> Tensor:
                images: Tensor = network(torch.randn(n, self.latent, generator=random, device=device))
                return images

            def terms(images: Tensor) -> dict[str, Tensor]:
                return loss(images, None)

            def told(step: int, value: Tensor) -> None:
                progress("mining", step, self.steps, loss=value)

            if loss.terms:
                with self._generator.protected(self.steps):
                    descend(draw, terms, [adam], steps=self.steps, told=told, keep="last")
            else:  # an adversarial objective without a student
                progress("mining", 1, 1)
            with torch.no_grad():
                images = torch.cat([draw() for _ in range(-(-count // self.batch_size))])[:count]
            passes = self.steps * self.batch_size if loss.terms else 0
            made = finished(teacher, images, images.new_zeros(count, dtype=torch.long), self.temperature, passes)
            return Impressions(made.images, made.targets, made.targets.argmax(1), made.teacher_passes)

    def state_dict(self) -> dict[str, Tensor]:
        """The generator and its optimiser; empty before the first call."""
        return self._generator.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._generator.load_state_dict(state)
