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
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.observation import Features, batch_norm_layers, frozen, observe
from fedimpr.synthesis.base import Progress, classes_of, device_of, label, silent
from fedimpr.synthesis.generator import Generator, ProjectionHead
from fedimpr.synthesis.priors import decision_adversarial, instance_contrast
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
        class_weight: of the cross-entropy to random labels.
        batch_norm_weight: of the distance to the teacher's running statistics.
        adversarial_weight: of the masked disagreement with the student.
        contrastive_weight: of the instance contrast.
        contrast_temperature: tau of the instance contrast.
        features: instance features, ``"batch_norm"`` or ``"penultimate"`` (see :func:`fedimpr.observation.observe`).
        hidden: units of the projection head's hidden layer, at most as many as there are features. It bounds the head, whose size would
            otherwise grow with the square of an ensemble's members.
        projection: size D of a projected feature.
        memory: how many instances' features the memory bank keeps, first in, first out.
        negatives: how many of them are drawn at random in each step.
        temperature: of the stored soft targets.
        global_view: the distribution of global views, which all terms but the contrast use alone.
        local_view: the distribution of local views.
    """

    latent: int
    width: int
    steps: int
    lr: float
    batch_size: int
    class_weight: float
    batch_norm_weight: float
    adversarial_weight: float
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
        for key in ("latent", "width", "steps", "lr", "contrast_temperature", "hidden", "projection", "memory", "temperature"):
            if getattr(self, key) <= 0:
                raise ConfigError(key, getattr(self, key), "a number > 0")
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2, since the generator normalises over the batch")
        for key in ("class_weight", "batch_norm_weight", "adversarial_weight", "contrastive_weight", "negatives"):
            if getattr(self, key) < 0:
                raise ConfigError(key, getattr(self, key), "a number >= 0")
        if self.features not in ("batch_norm", "penultimate"):
            raise ConfigError("features", self.features, "'batch_norm' or 'penultimate'")
        self._head: ProjectionHead | None = None
        self._head_adam: torch.optim.Adam | None = None
        self._memory: Tensor | None = None  # (B, 2, F): local and global features, the oldest first
        self._noted: set[str] = set()

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
        """
        device = device_of(teacher)
        batches = -(-count // self.batch_size)
        with frozen(teacher, student):
            terms = self._supported(teacher, student)
            classes = classes_of(teacher, shape, device)
            images, labels = [], []
            for b in range(batches):

                def told(step: int, loss: Tensor, before: int = b * self.steps) -> None:
                    progress("mining", before + step, batches * self.steps, loss=loss)

                wanted = torch.randint(classes, (self.batch_size,), generator=generator).to(device)
                images.append(self._mine_batch(teacher, student, terms, wanted, shape, generator, told))
                labels.append(wanted)
            mined, asked = torch.cat(images)[:count], torch.cat(labels)[:count]
            soft = label(teacher, mined, self.temperature)
        views = 2 if "contrastive" in terms else 1
        return Impressions(mined, soft, asked, teacher_passes=batches * self.batch_size * views * self.steps + count)

    def _mine_batch(
        self,
        teacher: nn.Module,
        student: nn.Module | None,
        terms: dict[str, float],
        wanted: Tensor,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        told: Callable[[int, Tensor], None],
    ) -> Tensor:
        device, n = wanted.device, len(wanted)
        with seeds.isolated(seeds.draw_seed(generator)):
            network = Generator(self.latent, self.width, shape).to(device)
        random = seeds.on_device(generator, device)
        latents = torch.randn(n, self.latent, generator=random, device=device).requires_grad_()
        adam = torch.optim.Adam([latents, *network.parameters()], lr=self.lr, betas=(0.5, 0.999))
        features = self.features if "contrastive" in terms else None
        best_loss, best = torch.full((), torch.inf, device=device), torch.zeros(n, *shape, device=device)
        for step in range(self.steps):
            images = network(latents)
            globally = self.global_view(images, random)
            seen = observe(teacher, globally, batch_norm="batch_norm" in terms, features=features)
            loss = self.class_weight * F.cross_entropy(seen.logits, wanted)
            if "batch_norm" in terms:
                loss = loss + self.batch_norm_weight * seen.batch_norm
            if "adversarial" in terms:
                assert student is not None
                loss = loss + self.adversarial_weight * decision_adversarial(seen.logits, student(globally))
            if "contrastive" in terms:
                locally = observe(teacher, self.local_view(images, random), features=features)
                loss = loss + self.contrastive_weight * self._contrast(locally.features, seen.features, generator)
            with torch.no_grad():  # on the device: the host never learns which step was best
                better = loss < best_loss
                best_loss, best = torch.where(better, loss, best_loss), torch.where(better, images, best)
            adam.zero_grad()
            if "contrastive" in terms:
                head = self._head_adam
                assert head is not None
                head.zero_grad()
                loss.backward()
                head.step()
            else:
                loss.backward()
            adam.step()
            told(step + 1, loss.detach())
        if features is not None:
            with torch.no_grad():
                views = (self.local_view(best, random), self.global_view(best, random))
                self._remember(torch.stack([observe(teacher, view, features=features).features for view in views], 1))
        return best

    def _contrast(self, local: Tensor, global_: Tensor, generator: torch.Generator) -> Tensor:
        size = local.shape[1]
        if self._head is None or self._head.size != size:
            if self._head is not None:
                log.info("CMI: the teacher's features changed size; head and memory bank start anew")
            with seeds.isolated(seeds.draw_seed(generator)):
                self._start_head(size, local.device)
        assert self._head is not None and self._memory is not None
        places = torch.randperm(len(self._memory), generator=generator)[: self.negatives].to(local.device)
        banked = self._memory[places]
        return instance_contrast(
            self._head(torch.cat([local, banked[:, 0]])),
            self._head(torch.cat([global_, banked[:, 1]])),
            len(local),
            self.contrast_temperature,
        )

    def _start_head(self, size: int, device: torch.device) -> None:
        self._head = ProjectionHead(size, self.hidden, self.projection).to(device)
        self._head_adam = torch.optim.Adam(self._head.parameters(), lr=self.lr)
        self._memory = torch.zeros(0, 2, size, device=device)

    def _remember(self, features: Tensor) -> None:
        assert self._memory is not None
        self._memory = torch.cat([self._memory, features])[-self.memory :]

    def _supported(self, teacher: nn.Module, student: nn.Module | None) -> dict[str, float]:
        """The weighted terms that this teacher and student can support; what is dropped is noted once."""
        has_statistics = bool(batch_norm_layers(teacher))
        missing = {
            "batch_norm": None if has_statistics else "the teacher has no batch norm",
            "adversarial": None if student is not None else "there is no student",
            "contrastive": None
            if has_statistics or self.features == "penultimate"
            else "the teacher has no batch norm to take features from",
        }
        terms = {}
        for term, reason in missing.items():
            weight = getattr(self, f"{term}_weight")
            if weight > 0 and reason is None:
                terms[term] = weight
            elif weight > 0 and term not in self._noted:
                self._noted.add(term)
                log.warning("CMI: the %s term (weight %g) is dropped: %s", term, weight, reason)
        return terms

    def state_dict(self) -> dict[str, Tensor]:
        """Head, its optimiser and the memory bank; empty before the first contrast."""
        if self._head is None or self._head_adam is None or self._memory is None:
            return {}
        state = {f"head.{name}": tensor.clone() for name, tensor in self._head.state_dict().items()}
        for index, moments in self._head_adam.state_dict()["state"].items():
            state |= {f"adam.{index}.{name}": tensor.clone() for name, tensor in moments.items()}
        return {**state, "memory": self._memory.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if not state:
            self._head = self._head_adam = self._memory = None
            return
        memory = state["memory"]
        with seeds.isolated(0):
            self._start_head(memory.shape[2], memory.device)
        assert self._head is not None and self._head_adam is not None
        self._memory = memory.clone()
        self._head.load_state_dict({name[5:]: tensor for name, tensor in state.items() if name.startswith("head.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor.clone()
        self._head_adam.load_state_dict({**self._head_adam.state_dict(), "state": moments})
