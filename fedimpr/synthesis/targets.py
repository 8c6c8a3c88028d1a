"""Target samplers: what the teacher is asked to see in an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import device_of
from fedimpr.ensemble import Ensemble, class_vectors
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.synthesis.base import classes_of

LEAST_CONCENTRATION = 1e-4


class Targets(NamedTuple):
    """What is wanted of a batch, on the CPU.

    Attributes:
        distributions: (N, K), rows sum to one.
        labels: (N,) int64, the class that each image is meant to show.
        rows: how many of them, in order, belong together; sums to N.
    """

    distributions: Tensor
    labels: Tensor
    rows: list[int]


class TargetSampler(Protocol):
    """A distribution over targets, which may depend on the teacher."""

    def draw(self, teacher: nn.Module, count: int, shape: tuple[int, int, int], temperature: float, generator: torch.Generator) -> Targets:
        """Draw ``count`` targets for the teacher's softmax at ``temperature`` on images of ``shape`` (C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class ClassSimilarity:
    """Dirichlet distributions whose concentrations are the similarities of the teacher's classes (ZSKD, Nayak et al., ICML 2019).

    Attributes:
        betas: scaling factors of the concentrations; small ones give peaked targets, large ones spread. Classes and betas share the
            images evenly.
        scaling: ``"matrix"``, similarities are scaled to [0, 1] over the whole matrix, as the text says; or ``"rows"``, row by row and
            whatever beta, as the released code does.
    """

    betas: tuple[float, ...]
    scaling: Literal["matrix", "rows"]

    def __post_init__(self) -> None:
        if not self.betas or min(self.betas) <= 0:
            raise ConfigError("betas", self.betas, "one or more numbers > 0")
        if self.scaling not in ("matrix", "rows"):
            raise ConfigError("scaling", self.scaling, "'matrix' or 'rows'")

    def draw(self, teacher: nn.Module, count: int, shape: tuple[int, int, int], temperature: float, generator: torch.Generator) -> Targets:
        """As :meth:`TargetSampler.draw`; in the order of (beta, class) rows.

        A row gets ``count // rows`` targets, the first ``count % rows`` rows one more. The label is the class that a row belongs to; the
        largest entry of a target may be another.

        Raises:
            TeacherError: the teacher has no final linear layer.
        """
        similarity = class_similarity(teacher).cpu()
        rows = torch.cat([concentrations(similarity, beta, self.scaling) for beta in self.betas]).numpy()
        random = np.random.default_rng(seeds.draw_seed(generator))
        shares = _even(count, len(rows))
        drawn = np.concatenate([random.dirichlet(row, size=share) for row, share in zip(rows, shares, strict=True)])
        labels = np.repeat(np.arange(len(rows)) % len(similarity), shares)
        return Targets(torch.from_numpy(drawn).float(), torch.from_numpy(labels).long(), shares)


@dataclass(frozen=True, kw_only=True)
class OneHot:
    """Certainty of one class: class impressions, the ablation of ZSKD; classes share the images evenly."""

    def draw(self, teacher: nn.Module, count: int, shape: tuple[int, int, int], temperature: float, generator: torch.Generator) -> Targets:
        """As :meth:`TargetSampler.draw`; in the order of classes."""
        classes = classes_of(teacher, shape, device_of(teacher))
        shares = _even(count, classes)
        labels = torch.repeat_interleave(torch.arange(classes), torch.tensor(shares))
        return Targets(F.one_hot(labels, classes).float(), labels, shares)


@dataclass(frozen=True, kw_only=True)
class FeatureGaussian:
    """Answers to samples of an intermediate feature space.

    Wang, *Data-Free Knowledge Distillation with Soft Targeted Transfer Set Synthesis*, AAAI 2021 (arXiv 2104.04868). The outputs of an
    intermediate layer are modelled as normal, with the cosine similarities of its units' weights as correlations and a common standard
    deviation. Samples go through the rest of the teacher, and its softmax is the target. So every target is one that the teacher can give,
    and its label is its largest entry.

    The layer is the last but one with weights, linear or convolutional; a convolution's samples are the same at every position. The mean,
    which our sources leave open, is the layer's bias. Where batch norm follows, it scales the samples, so they are drawn on its running
    mean and deviation. An ensemble's targets come from its members in turn.

    Attributes:
        deviation: sigma > 0; of a unit before its activation, or in units of the running deviation where batch norm follows.
    """

    deviation: float

    def __post_init__(self) -> None:
        if self.deviation <= 0:
            raise ConfigError("deviation", self.deviation, "a number > 0")

    def draw(self, teacher: nn.Module, count: int, shape: tuple[int, int, int], temperature: float, generator: torch.Generator) -> Targets:
        """As :meth:`TargetSampler.draw`.

        Raises:
            TeacherError: the teacher has fewer than two layers with weights.
        """
        members = list(teacher.members) if isinstance(teacher, Ensemble) else [teacher]
        shares = _even(count, len(members))
        with torch.no_grad():
            logits = [self._answers(member, n, shape, generator) for member, n in zip(members, shares, strict=True) if n]
        distributions = torch.softmax(torch.cat(logits) / temperature, 1).cpu()
        return Targets(distributions, distributions.argmax(1), [count])

    def _answers(self, model: nn.Module, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        if len(layers) < 2:
            raise TeacherError("the model has no layer before its final one", value=type(model).__name__, stage="synthesis")
        layer, norm = layers[-2], _norm_after(layers[-2], model)
        units = F.normalize(layer.weight.detach().double().cpu().flatten(1), dim=1)
        values, vectors = torch.linalg.eigh(units @ units.T)  # correlations; the root works for singular ones, too
        root = vectors * values.clamp_min(0).sqrt()
        drawn = self.deviation * torch.randn(count, len(units), generator=generator, dtype=torch.float64) @ root.T
        device = layer.weight.device
        samples = drawn.float().to(device)
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            samples = norm.running_mean + samples * norm.running_var.sqrt()
        elif layer.bias is not None:
            samples = samples + layer.bias.detach()
        answers = []
        for part in samples.split(500):

            def instead(_: nn.Module, __: object, output: Tensor, part: Tensor = part) -> Tensor:
                return part if output.dim() == 2 else part[:, :, None, None].expand(-1, -1, *output.shape[2:])

            hook = layer.register_forward_hook(instead)
            try:
                answers.append(model(torch.zeros(len(part), *shape, device=device)).float())
            finally:
                hook.remove()
        return torch.cat(answers)


def class_similarity(teacher: nn.Module) -> Tensor:
    """Cosine similarity (K, K) between the vectors that the final layer keeps for each class (ZSKD; biases left out).

    For an ensemble these are the vectors of the final layer it effectively has, over the concatenated features of all members: see
    :func:`fedimpr.ensemble.class_vectors`. A client that never saw class k thus speaks on k with as much voice as its weight in the
    ensemble gives it.
    """
    directions = F.normalize(class_vectors(teacher).double(), dim=1)
    return directions @ directions.T


def concentrations(similarity: Tensor, beta: float, scaling: Literal["matrix", "rows"]) -> Tensor:
    """Dirichlet concentrations (K, K); row k belongs to class k.

    ``matrix``: similarities scaled to [0, 1] over the whole matrix, times beta. ``rows``: scaled row by row, whatever beta.
    """
    if scaling == "matrix":
        low, high, factor = similarity.min(), similarity.max(), beta
    else:
        low, high, factor = similarity.min(1, keepdim=True).values, similarity.max(1, keepdim=True).values, 1.0
    return (factor * (similarity - low) / (high - low).clamp_min(1e-12)).clamp_min(LEAST_CONCENTRATION)


def _even(count: int, parts: int) -> list[int]:
    return [count // parts + (part < count % parts) for part in range(parts)]


def _norm_after(layer: nn.Module, model: nn.Module) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
    """The batch norm that directly follows a layer in module order and has as many channels."""
    modules = [module for module in model.modules() if not list(module.children())]
    after = modules[modules.index(layer) + 1 :][:1]
    if after and isinstance(after[0], nn.BatchNorm1d | nn.BatchNorm2d) and after[0].running_mean is not None:
        return after[0] if len(after[0].running_mean) == layer.weight.shape[0] else None  # type: ignore[index]
    return None
