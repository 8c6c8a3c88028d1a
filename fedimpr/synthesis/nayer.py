"""NAYER: classes enter a generator as embeddings, and noise enters as a layer whose weights are drawn anew for every batch.

Tran, Le, Le, Harandi, Tran, Phung: *NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge Distillation*,
CVPR 2024 (arXiv 2310.00258).

Differences: the paper's embeddings are a language model's for the names of the classes. Names and such a model are knowledge that the
teacher does not hold, so here the user supplies the embeddings in a file, or they are learned; the impressions' note says which. The
authors' code lets generators live longer before the student's first step; here they live equally long throughout. The generator is CMI's.
As in that code, matched statistics are mixed with those of earlier batches, and a batch keeps the images of its best step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import accelerated, device_of, placed
from fedimpr.embeddings import of_outputs, read_embeddings
from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.observation import frozen, observe
from fedimpr.synthesis.base import Progress, classes_of, finished, require, silent
from fedimpr.synthesis.descent import Mined, Told, descend, mine_batches
from fedimpr.synthesis.generator import Generator
from fedimpr.synthesis.priors import Priors
from fedimpr.synthesis.state import MovingStatistics, Trained
from fedimpr.views import Views


class NoisyNetwork(nn.Module):
    """Classes to images: embedding, normalisation, a noisy layer that is given with the classes, and a generator.

    Args:
        embeddings: (K, E), of the classes; ``None`` where they are to be learned.
        classes: K.
        embedding: E.
        latent: size Z of what the noisy layer makes.
        width: channels of the generator.
        shape: (C, H, W) of the images.
    """

    def __init__(
        self, embeddings: Tensor | None, classes: int, embedding: int, latent: int, width: int, shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.table: Tensor
        if embeddings is None:
            self.table = nn.Parameter(torch.randn(classes, embedding))
        else:
            self.register_buffer("table", embeddings.clone(), persistent=False)
        self.normalise = nn.BatchNorm1d(embedding)
        self.generator = Generator(latent, width, shape)

    def forward(self, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1].

        Args:
            labels: (N,).
            weight: (L, E, Z) of L noisy layers; each takes the next equal share of the images, the last what is left.
            bias: (L, 1, Z).
        """
        vectors = self.normalise(F.embedding(labels, self.table))
        n, layers = len(vectors), len(weight)
        shares = F.pad(vectors, (0, 0, 0, -n % layers)).unflatten(0, (layers, -1))
        images: Tensor = self.generator(torch.baddbmm(bias, shares, weight).flatten(0, 1)[:n])
        return images


@dataclass(kw_only=True)
class NoisyLayerGenerator:
    """Train a generator of class embeddings and fresh noisy layers on one balanced batch after another.

    Attributes:
        priors: weights of the inversion loss.
        embeddings: a safetensors file with one tensor, ``embeddings`` (K, E), of the names of the classes; or ``None``: they are learned.
        embedding: E.
        latent: size Z of what the noisy layer makes of an embedding.
        width: channels of the generator.
        shared: how many images share a noisy layer; at most K do, since a layer makes only one image of a class.
        life: batches after which everything that is trained starts anew.
        steps: Adam steps per batch.
        lr: Adam's learning rate.
        momentum: share of earlier batches in the statistics that are matched, in [0, 1); see
            :class:`~fedimpr.synthesis.state.MovingStatistics`.
        batch_size: images optimised together.
        temperature: of the stored soft targets.
        views: how images are moved before teacher and student see them in each step.
    """

    priors: Priors
    embeddings: str | None
    embedding: int
    latent: int
    width: int
    shared: int
    life: int
    steps: int
    lr: float
    momentum: float
    batch_size: int
    temperature: float
    views: Views

    def __post_init__(self) -> None:
        require(self, above_zero=("embedding", "latent", "width", "shared", "life", "steps", "lr", "temperature"))
        if self.batch_size < 2:
            raise ConfigError("batch_size", self.batch_size, "an integer >= 2, since the generator normalises over the batch")
        self._table = None if self.embeddings is None else _read(self.embeddings, self.embedding)
        self._network = Trained()
        self._age = 0
        self._statistics = MovingStatistics(self.momentum)

    def of(self, classes: Sequence[int], quarters: int) -> None:
        """Let the next teacher be one of these classes of the embeddings, in the order of its outputs; nothing where they are learned.

        Args:
            classes: their rows.
            quarters: turns that the teacher knows each of them in, see :func:`fedimpr.embeddings.of_outputs`.

        Raises:
            ConfigError: there is no such row.
        """
        if self._table is not None:
            if max(classes) >= len(self._table):
                raise ConfigError("embeddings", self.embeddings, f"a file with a row for each class; it has {len(self._table)}")
            self._table = of_outputs(self._table, classes, quarters)

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
            ConfigError: ``embeddings`` are not those of as many classes as the teacher has.
            TeacherError: the teacher's logits are not finite.
            Diverged: every batch diverged.
        """
        device, n = device_of(teacher), self.batch_size
        with frozen(teacher, student), accelerated(device):
            classes = classes_of(teacher, shape, device)
            if self._table is not None and len(self._table) != classes:
                raise ConfigError("embeddings", self.embeddings, f"a file with {classes} rows, one a class; it has {len(self._table)}")
            loss = self.priors.bound(teacher, student)
            random = seeds.on_device(generator, device)
            layers = -(-n // min(self.shared, classes))

            def mine(batch: int, told: Told) -> Mined:
                if self._age == self.life:
                    self._network, self._age = Trained(), 0
                self._age += 1
                with seeds.isolated(seeds.draw_seed(generator)):
                    fresh = placed(NoisyNetwork(self._table, classes, self.embedding, self.latent, self.width, shape), device)
                network, adam = self._network.resumed(fresh, self._adam)
                # No class comes twice within K images in a row, so none comes twice to one noisy layer.
                labels = torch.randperm(classes, generator=generator)[torch.arange(n) % classes].to(device)
                weight = torch.randn(layers, self.embedding, self.latent, generator=random, device=device).requires_grad_()
                bias = torch.zeros(layers, 1, self.latent, device=device).requires_grad_()

                def terms(images: Tensor) -> dict[str, Tensor]:
                    views = self.views(images, random)
                    seen = observe(teacher, views, statistics=loss.statistics, features=loss.features)
                    return loss.of(views, self._statistics.mixed(seen), labels)

                def draw() -> Tensor:
                    images: Tensor = network(labels, weight, bias)
                    return images

                with self._network.protected(self.steps):
                    images = descend(draw, terms, [adam, self._adam([weight, bias])], steps=self.steps, told=told, keep="best")
                    adam.state.clear()  # every batch starts with a new Adam
                self._statistics.advance()
                return Mined(images, labels)

            batches = -(-count // n)
            images, labels = mine_batches(batches, self.steps, progress, mine)
            made = finished(teacher, images[:count], labels[:count], self.temperature, batches * n * self.steps)
            origin = "learned" if self.embeddings is None else f"from {Path(self.embeddings).name}"
            return replace(made, note=f"class embeddings: {origin}")

    def _adam(self, parameters: Iterable[Tensor]) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=self.lr, betas=(0.5, 0.999))

    def state_dict(self) -> dict[str, Tensor]:
        """The network, its age in batches and the average of the statistics."""
        network = {f"network.{key}": value for key, value in self._network.state_dict().items()}
        statistics = {f"statistics.{key}": value for key, value in self._statistics.state_dict().items()}
        return {**network, **statistics, "age": torch.tensor(self._age)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._network.load_state_dict({key[8:]: value for key, value in state.items() if key.startswith("network.")})
        self._statistics.load_state_dict({key[11:]: value for key, value in state.items() if key.startswith("statistics.")})
        self._age = int(state["age"]) if "age" in state else 0


def _read(file: str, size: int) -> Tensor:
    """The embeddings (K, size) in a file."""
    found = read_embeddings(file)
    if found.shape[1] != size:
        raise ConfigError("embeddings", file, f"a file with embeddings (classes, {size}); they are {tuple(found.shape)}")
    return found
