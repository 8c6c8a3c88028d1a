"""Answers that spread among images which look alike.

Zhou, Bousquet, Lal, Weston, Schölkopf: *Learning with Local and Global Consistency*, NeurIPS 2003.

Images are the nodes of a graph whose edges are the more similar features; each image's answer moves towards its neighbours' and is held by
what it was. Wrong answers that lie scattered among right ones are outvoted.

Differences: every image starts with an answer, where the paper has a few labels; an image has edges to a few neighbours alone, of weight
the cube of the cosine of their features in place of a Gaussian of their distance; and the sum is cut off after some passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedimpr.adaptation.shapes import require_rows
from fedimpr.errors import ConfigError, FedimprError

STAGE = "spreading answers"
AT_ONCE = 1000  # images that are compared with all others in one call, so that memory grows with N and not with its square


@dataclass(frozen=True, kw_only=True)
class Spreading:
    """Some passes of ``reach * S @ answers + (1 - reach) * first answers``.

    S is symmetric: half the weight of the edge of one image to the other and half of that back, over the roots of both images' sums.

    Attributes:
        neighbours: edges of an image, >= 1; N - 1 at most are there.
        reach: in [0, 1); 0 leaves answers as they are. 0.99 in the paper.
        passes: >= 0.
    """

    neighbours: int
    reach: float
    passes: int

    def __post_init__(self) -> None:
        for key, least in (("neighbours", 1), ("passes", 0)):
            if getattr(self, key) < least:
                raise ConfigError(key, getattr(self, key), f"an integer >= {least}")
        if not 0 <= self.reach < 1:
            raise ConfigError("reach", self.reach, "a number in [0, 1)")

    def __call__(self, features: Tensor, answers: Tensor) -> Tensor:
        """Answers (N, K) after all passes; rows sum to one.

        Args:
            features: (N, F), N >= 2; their lengths do not count.
            answers: (N, K), >= 0, rows sum to one.

        Raises:
            FedimprError: the shapes are others, or a number is not finite.
        """
        require_rows(features, "features", STAGE, least=2)
        require_rows(answers, "answers", STAGE)
        if len(features) != len(answers):
            raise FedimprError("features and answers must be of the same images", stage=STAGE, value=(len(features), len(answers)))
        if not bool(features.isfinite().all() & answers.isfinite().all()):
            raise FedimprError("features and answers must be finite", stage=STAGE, remedy="Look at the source models' weights.")
        (one, two, weights), moved = _edges(features, min(self.neighbours, len(features) - 1)), answers
        for _ in range(self.passes):
            moved = torch.zeros_like(answers).index_add(0, one, self.reach * weights[:, None] * moved[two]) + (1 - self.reach) * answers
        return moved / moved.sum(1, keepdim=True)


def evened(answers: Tensor) -> Tensor:
    """Answers (N, K) over the mean answer, so that no class is favoured; rows sum to one again.

    A network far from its domain answers a few classes for nearly everything; which of the others an image is rather than the rest is still
    in its answer. Right where all classes are about equally frequent.

    Args:
        answers: (N, K), >= 0, rows sum to one. A class that has no share in any stays without.
    """
    shares = answers / answers.mean(0).clamp_min(torch.finfo(answers.dtype).tiny)
    return shares / shares.sum(1, keepdim=True)


def levelled(logits: Tensor) -> Tensor:
    """What logits (N, K) say of an image and not of all images: less each image's mean and then each class's, at a mean length of one.

    A network's logits grow, and lean to a few classes, the farther it is from its domain; levelled, those of several can be averaged.

    Args:
        logits: (N, K). Where all images have the same, zeros come back.
    """
    apart = logits - logits.mean(1, keepdim=True)
    apart = apart - apart.mean(0)
    length: Tensor = torch.linalg.vector_norm(apart, dim=1).mean()
    return apart / length.clamp_min(torch.finfo(apart.dtype).tiny)


def _edges(features: Tensor, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """S: from where, to where and how much, each (2 * N * neighbours,); what stands there twice adds up."""
    units, count = F.normalize(features, dim=1), len(features)
    rows = torch.arange(count)
    cosines, others = list[Tensor](), list[Tensor]()
    for part in rows.split(AT_ONCE):
        near = units[part] @ units.T
        near[torch.arange(len(part)), part] = -torch.inf  # nobody is a neighbour of its own
        best = near.topk(neighbours, 1)
        cosines.append(best.values)
        others.append(best.indices)
    near_by, far = rows.repeat_interleave(neighbours), torch.cat(others).flatten()
    one, two = torch.cat([near_by, far]), torch.cat([far, near_by])
    half = (torch.cat(cosines).flatten().clamp_min(0) ** 3 / 2).repeat(2)
    sums = torch.zeros(count, dtype=half.dtype).index_add(0, one, half)
    roots = sums.clamp_min(torch.finfo(half.dtype).tiny).rsqrt()
    return one, two, half * roots[one] * roots[two]
