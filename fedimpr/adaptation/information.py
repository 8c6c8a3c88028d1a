"""What SHOT learns from unlabelled target images.

Liang, Hu, Feng: *Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain Adaptation*, ICML 2020
(arXiv 2002.08546).

The final layer stays as the source left it. The rest learns to answer each image with certainty, all classes equally often, and each image
with its pseudo-label.

Differences: as in the released code, a one is appended to the features before they are compared by their cosine, and their lengths do not
count in a centroid; and classes that the model answers too rarely get no centroid. A class that no image is nearest to gets none in the
refinement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedimpr.adaptation.shapes import require_rows
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.synthesis.priors import entropy, imbalance


def information_loss(logits: Tensor) -> Tensor:
    """The mean entropy of the answers minus the entropy of the mean answer, in nats; a scalar in [-ln K, 0], minimised.

    Args:
        logits: (N, K).

    Raises:
        FedimprError: the logits have another shape.
    """
    require_rows(logits, "logits", "information maximisation")
    return entropy(logits) + imbalance(logits)


@torch.no_grad()
def pseudo_labels(features: Tensor, logits: Tensor, *, at_least: int) -> Tensor:
    """The class whose centroid is nearest to each image by the cosine; (N,), int64.

    The first centroids are means of the features weighted by the softmax; the images nearest to each then make its second centroid.

    Args:
        features: (N, F), of all target images.
        logits: (N, K), of the same.
        at_least: a class that the model answers for fewer images is given to none, >= 1. For a target with a subset of the classes it can
            be larger than 1.

    Raises:
        FedimprError: the shapes are others, or every class is too rare.
        ConfigError: ``at_least`` is out of range.
    """
    stage = "pseudo-labels"
    require_rows(features, "features", stage)
    require_rows(logits, "logits", stage)
    if len(features) != len(logits):
        raise FedimprError("features and logits must be of the same images", stage=stage, value=(len(features), len(logits)))
    if at_least < 1:
        raise ConfigError("at_least", at_least, "a whole number >= 1")
    answered = logits.argmax(1).bincount(minlength=logits.shape[1])
    kept = (answered >= at_least).nonzero().flatten()
    if not len(kept):
        most = int(answered.max())
        raise FedimprError(f"no class is answered for {at_least} images, only for up to {most}", stage=stage, remedy="Lower at_least.")
    units = F.normalize(torch.cat([features, torch.ones_like(features[:, :1])], 1), dim=1)
    shares = logits.softmax(1)[:, kept].to(units.dtype)
    with torch.autocast(features.device.type, enabled=False):  # neighbours differ in a cosine's last digits
        nearest = _nearest(units, shares)
        nearest = _nearest(units, F.one_hot(nearest, len(kept)).to(units.dtype))
    return kept[nearest]


def _nearest(units: Tensor, shares: Tensor) -> Tensor:
    """(N,): the centroid with the largest cosine, the centroids means of the unit vectors (N, F) weighted by shares (N, K)."""
    cosines = units @ F.normalize(shares.T @ units, dim=1).T
    return cosines.masked_fill(shares.sum(0) == 0, -torch.inf).argmax(1)
