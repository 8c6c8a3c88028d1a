"""What makes an image one that the teacher could have been trained on: the terms of inversion losses, and their weighted sum.

The terms are pure functions. :class:`Priors` holds a method's weights; a term of weight 0 is not computed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError
from fedimpr.observation import Features, Observation, batch_norm_layers, observe, running

log = logging.getLogger(__name__)

Disagreement = Literal["kl", "masked_kl", "l1", "js"]
TINY = 1e-12


class RunningStatistics:
    """What the batch-norm layers of a teacher remember of the images that it was trained on.

    Args:
        teacher: a model or an ensemble. Distances to an ensemble are means over its members.
    """

    def __init__(self, teacher: nn.Module) -> None:
        layers = batch_norm_layers(teacher)
        self.layers = len(layers)
        self.members = len(teacher) if isinstance(teacher, Ensemble) else 1
        if layers:
            remembered = [running(layer) for layer in layers]
            self.values = torch.cat(remembered, 1)  # (2, S)
            sizes = torch.tensor([part.shape[1] for part in remembered])
            self.layer = torch.repeat_interleave(torch.arange(self.layers), sizes).to(self.values.device)

    def distance(self, statistics: Tensor) -> Tensor:
        """Sum over layers of ``|mean - running mean|_2 + |variance - running variance|_2`` (DeepInversion, CMI); a scalar.

        Args:
            statistics: (2, S) of a batch, see :class:`~fedimpr.observation.Observation`.
        """
        squares = statistics.new_zeros(2, self.layers).index_add(1, self.layer, (statistics - self.values).square())
        total: Tensor = squares.clamp_min(TINY).sqrt().sum() / self.members  # clamped: the root has no slope at zero
        return total

    def divergence(self, statistics: Tensor) -> Tensor:
        """Sum over channels of KL(N(mean, variance) || N(running mean, running variance)) (Choi et al., CVPRW 2020); a scalar."""
        (mean, variance), (kept_mean, kept_variance) = statistics, self.values
        ratio = (variance + TINY) / (kept_variance + TINY)
        gaps: Tensor = (ratio + (mean - kept_mean).square() / (kept_variance + TINY) - 1 - ratio.log()) / 2
        return gaps.sum() / self.members


def cross_entropy(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the softmax at a temperature to ``wanted``: classes (N,) or distributions (N, K); a mean over the batch."""
    return F.cross_entropy(logits / temperature, wanted)


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the softmax of each image, in nats; small where the teacher is certain."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def imbalance(logits: Tensor) -> Tensor:
    """Minus the entropy of the mean softmax of the batch, in nats; least, -ln K, where all classes are answered equally often (DAFL)."""
    mean = logits.softmax(1).mean(0)
    return (mean * mean.clamp_min(TINY).log()).sum()


def total_variation(images: Tensor) -> Tensor:
    """Sum of the L2 norms of the batch's differences between neighbours: right, down and both diagonals (DeepInversion); a scalar."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return torch.stack([difference.square().sum().clamp_min(TINY).sqrt() for difference in differences]).sum()


def disagreement(teacher_logits: Tensor, student_logits: Tensor, form: Disagreement) -> Tensor:
    """How far the student is from the teacher, a mean over the batch; adversarial methods look for images where it is large.

    ``kl``: KL(teacher || student). ``masked_kl``: the same where both decide for one class, else 0 (CMI). ``l1``: mean absolute difference
    of the logits (DFAD). ``js``: Jensen-Shannon divergence at temperature 3 (DeepInversion).

    Args:
        teacher_logits: (N, K).
        student_logits: (N, K).
        form: see above.
    """
    if form == "l1":
        return (teacher_logits - student_logits).abs().mean()
    if form == "js":
        p, q = (teacher_logits / 3).log_softmax(1), (student_logits / 3).log_softmax(1)
        middle = torch.logaddexp(p, q) - math.log(2)  # in logarithms throughout: at a probability of zero p ln p has no slope
        return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1).mean() / 2
    divergence = F.kl_div(student_logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="none", log_target=True).sum(1)
    if form == "masked_kl":
        divergence = divergence * (teacher_logits.argmax(1) == student_logits.argmax(1))
    return divergence.mean()


def instance_contrast(local: Tensor, global_: Tensor, current: int, temperature: float) -> Tensor:
    """Contrastive loss over current and banked instances; a scalar (CMI).

    Each instance's local view must find its own global view among those of all instances. The mean over the current instances and the
    mean over the banked ones are added, so that a large bank does not thin the gradient of the current batch. No gradient flows through
    the keys.

    Args:
        local: unit vectors (N + B, D) of the local views, the current N first.
        global_: unit vectors (N + B, D) of the global views in the same order.
        current: N.
        temperature: tau > 0 that divides the cosines.
    """
    cosines = local @ global_.detach().T
    losses = F.cross_entropy(cosines / temperature, torch.arange(len(local), device=local.device), reduction="none")
    loss = losses[:current].mean()
    return loss + losses[current:].mean() if len(local) > current else loss


@dataclass(kw_only=True)
class Priors:
    """The weights >= 0 of an inversion loss, and its forms.

    Attributes:
        target: of the cross-entropy to what was wanted, classes or distributions.
        confidence: of the cross-entropy to the teacher's own decision (DAFL's one-hot loss).
        entropy: of the mean entropy of the answers (DFQ).
        balance: of minus the entropy of the mean answer (DAFL, DFQ).
        activation: of minus the mean magnitude of the penultimate features (DAFL, soft-targeted transfer sets).
        batch_norm: of the gap between the batch's statistics and the teacher's running ones.
        total_variation: of the roughness of the images.
        norm: of the L2 norm of the batch.
        adversarial: of minus the disagreement between teacher and student.
        batch_norm_form: ``"distance"`` or ``"divergence"``, see :class:`RunningStatistics`.
        adversarial_form: see :func:`disagreement`.
    """

    target: float
    confidence: float
    entropy: float
    balance: float
    activation: float
    batch_norm: float
    total_variation: float
    norm: float
    adversarial: float
    batch_norm_form: Literal["distance", "divergence"]
    adversarial_form: Disagreement

    def __post_init__(self) -> None:
        for field in fields(self)[:9]:
            if getattr(self, field.name) < 0:
                raise ConfigError(field.name, getattr(self, field.name), "a number >= 0")
        if self.batch_norm_form not in ("distance", "divergence"):
            raise ConfigError("batch_norm_form", self.batch_norm_form, "'distance' or 'divergence'")
        if self.adversarial_form not in ("kl", "masked_kl", "l1", "js"):
            raise ConfigError("adversarial_form", self.adversarial_form, "'kl', 'masked_kl', 'l1' or 'js'")
        self._noted: set[str] = set()

    def bound(self, teacher: nn.Module, student: nn.Module | None, temperature: float = 1.0) -> Inversion:
        """The loss for one teacher and student; a term that they cannot support is dropped, and a warning says so once."""
        statistics = RunningStatistics(teacher)
        terms = {field.name for field in fields(self)[:9] if getattr(self, field.name) > 0}
        lacking = {
            "batch_norm": None if statistics.layers else "the teacher has no batch norm",
            "adversarial": "there is no student" if student is None else None,
        }
        for term, reason in lacking.items():
            if term in terms and reason is not None:
                terms.remove(term)
                if term not in self._noted:
                    self._noted.add(term)
                    log.warning("the %s term (weight %g) is dropped: %s", term, getattr(self, term), reason)
        return Inversion(self, terms, statistics, teacher, student, temperature)


class Inversion:
    """An inversion loss bound to a teacher and a student; made by :meth:`Priors.bound`.

    Attributes:
        terms: the names of the terms that are computed.
        statistics: whether they need the batch's statistics.
        features: the features that they need.
    """

    def __init__(
        self,
        priors: Priors,
        terms: set[str],
        remembered: RunningStatistics,
        teacher: nn.Module,
        student: nn.Module | None,
        temperature: float,
    ) -> None:
        self.priors, self.terms, self.temperature = priors, terms, temperature
        self.remembered, self.teacher, self.student = remembered, teacher, student
        self.statistics = "batch_norm" in terms
        self.features: Features | None = "penultimate" if "activation" in terms else None

    def __call__(self, images: Tensor, wanted: Tensor | None) -> dict[str, Tensor]:
        """The weighted terms by name, each a scalar, of views (N, C, H, W); ``wanted`` as in :meth:`of`."""
        return self.of(images, observe(self.teacher, images, statistics=self.statistics, features=self.features), wanted)

    def of(self, images: Tensor, seen: Observation, wanted: Tensor | None) -> dict[str, Tensor]:
        """The weighted terms of images that the teacher has seen already.

        Args:
            images: (N, C, H, W).
            seen: what the teacher showed on them, and perhaps on more images after them; its statistics are of these N.
            wanted: classes (N,) or distributions (N, K); needed by the target term only.
        """
        logits, p = seen.logits[: len(images)], self.priors
        found: dict[str, Tensor] = {}
        if "target" in self.terms:
            assert wanted is not None
            found["target"] = cross_entropy(logits, wanted, self.temperature)
        if "confidence" in self.terms:
            found["confidence"] = cross_entropy(logits, logits.argmax(1), 1.0)
        if "entropy" in self.terms:
            found["entropy"] = entropy(logits)
        if "balance" in self.terms:
            found["balance"] = imbalance(logits)
        if "activation" in self.terms:
            found["activation"] = -seen.features[: len(images)].abs().mean()
        if "batch_norm" in self.terms:
            gap = self.remembered.distance if p.batch_norm_form == "distance" else self.remembered.divergence
            found["batch_norm"] = gap(seen.statistics)
        if "total_variation" in self.terms:
            found["total_variation"] = total_variation(images)
        if "norm" in self.terms:
            found["norm"] = images.square().sum().clamp_min(TINY).sqrt()
        if "adversarial" in self.terms:
            assert self.student is not None
            found["adversarial"] = -disagreement(logits, self.student(images).float(), p.adversarial_form)
        return {name: getattr(p, name) * value for name, value in found.items()}
