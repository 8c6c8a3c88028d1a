"""Measures of a transfer set: how the teacher understands it, how varied it is, and how far it lies from real images.

Features are the input of the teacher's final layer. Distances between them are in the teacher's own units: they compare sets that were
mined from one teacher, not teachers.

All linear algebra is float64 and works on whichever of N x N and F x F is smaller, so a wide ensemble costs little more than its features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import device_of
from fedimpr.errors import FedimprError, TeacherError
from fedimpr.observation import Features, Observation, frozen, observe

ROWS = 500  # of a distance matrix that are in memory together


def describe(
    teacher: nn.Module, images: Tensor, labels: Tensor, *, real: Tensor | None, limit: int, batch: int, neighbours: int
) -> dict[str, float]:
    """All measures of a transfer set, by name.

    Args:
        teacher: a model or an :class:`~fedimpr.ensemble.Ensemble`; left as it was found.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64, the class that each image was asked to show.
        real: (R, C, H, W) in [0, 1], R > ``neighbours``: real images to compare with, or ``None`` where there are none. For evaluation
            only, never for tuning: whoever chooses a setting by them has looked at data that a data-free method must not see.
        limit: images of each set that are looked at, at most; see :func:`drawn`.
        batch: images in one pass through the teacher.
        neighbours: of :func:`coverage`.

    Returns:
        ``label_fidelity`` and ``confidence`` in [0, 1]; ``mean_distance`` in the teacher's units; ``effective_number`` in [1, N]; and with
        real images ``coverage`` in [0, 1] and ``frechet_distance`` in the square of the teacher's units. Where the teacher has no final
        linear layer, or features that are not finite, only the first two.

    Raises:
        FedimprError: there are too few real images.
    """
    places = drawn(len(images), limit)
    images, labels = images[places], labels[places]
    try:
        made = features_of(teacher, images, batch)
    except TeacherError:
        made = _observed(teacher, images, batch, None)
    found = {"label_fidelity": label_fidelity(made.logits, labels), "confidence": confidence(made.logits)}
    if made.features.shape[1] == 0:
        return found
    found |= {"mean_distance": mean_distance(made.features), "effective_number": effective_number(made.features)}
    if real is None:
        return found
    features = features_of(teacher, real[drawn(len(real), limit)], batch).features
    return found | {
        "coverage": coverage(features, made.features, neighbours),
        "frechet_distance": frechet_distance(features, made.features),
    }


def drawn(count: int, limit: int) -> Tensor:
    """The places, ascending, of at most ``limit`` of ``count`` images: all, or a random choice that depends on both numbers only.

    Not every n-th image: wanted classes often follow each other with a period, and n may be a multiple of it.
    """
    return torch.randperm(count, generator=seeds.generator(0, "measures"))[:limit].sort().values


def features_of(teacher: nn.Module, images: Tensor, batch: int) -> Observation:
    """Logits (N, K) and penultimate features (N, F) in float64, on the teacher's device; an ensemble concatenates its members' features.

    Args:
        teacher: a model or an ensemble; left as it was found.
        images: (N, C, H, W) in [0, 1].
        batch: images in one pass.

    Raises:
        TeacherError: the teacher has no final linear layer, or features that are not finite.
    """
    seen = _observed(teacher, images, batch, "penultimate")
    if not bool(seen.features.isfinite().all()):
        raise TeacherError("the teacher's features are not finite", stage="measuring impressions")
    return seen


def label_fidelity(logits: Tensor, labels: Tensor) -> float:
    """The share, in [0, 1], of images whose largest logit (N, K) is the wanted class (N,)."""
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())


def confidence(logits: Tensor) -> float:
    """The mean, in [1 / K, 1], of the largest class probability at temperature 1; ``logits`` is (N, K)."""
    return float(logits.double().softmax(1).amax(1).mean())


def mean_distance(features: Tensor) -> float:
    """The mean Euclidean distance over all pairs of two different rows of ``features`` (N, F); not a number where N < 2."""
    count = len(features)
    # Each block of rows meets only the rows from its own first one on: every pair once.
    total = sum(torch.cdist(features[i : i + ROWS], features[i:]).triu(1).sum() for i in range(0, count, ROWS))
    return float(total / (count * (count - 1) / 2)) if count > 1 else float("nan")


def effective_number(features: Tensor) -> float:
    """How many wholly unlike images would be as varied as these: the Vendi score (Friedman and Dieng, TMLR 2023) with cosine similarity.

    It is the exponential of the entropy of the eigenvalues of K / N, where K holds the cosines between the rows of ``features`` (N, F): 1
    where all point one way, N where all are orthogonal. Rows of zeros count as alike, and orthogonal to all others.
    """
    zero = features.norm(dim=1, keepdim=True) == 0
    rows = F.normalize(torch.cat([features, zero.to(features)], 1), eps=0)
    # The F x F matrix has the same eigenvalues but for zeros, which add no entropy.
    kernel = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T
    shares = torch.linalg.eigvalsh(kernel / len(rows)).clamp_min(0)
    return float((-torch.xlogy(shares, shares).sum()).exp())


def coverage(real: Tensor, made: Tensor, neighbours: int) -> float:
    """The share, in [0, 1], of real images that have a made one in their neighbourhood (Naeem et al., ICML 2020; they use 5 neighbours).

    Args:
        real: features (R, F), R > ``neighbours``. The neighbourhood of one is the closed ball that reaches to its ``neighbours``-th nearest
            other one.
        made: features (N, F).
        neighbours: >= 1.

    Raises:
        FedimprError: ``neighbours`` is not in [1, R).
    """
    if not 1 <= neighbours < len(real):
        raise FedimprError(f"coverage of {len(real)} real images needs 1 to {len(real) - 1} neighbours", value=neighbours)
    covered = []
    for rows in real.split(ROWS):
        radius = torch.cdist(rows, real).kthvalue(neighbours + 1).values  # the nearest of all is the image itself
        covered.append(torch.cdist(rows, made).amin(1) <= radius)
    return float(torch.cat(covered).double().mean())


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """The Frechet distance between normal distributions fitted to both sets (Heusel et al., NeurIPS 2017), >= 0, in squared units.

    Theirs looks at the features of an Inception network; this one at whatever it is given. Covariances are those of samples (divided by
    N - 1, zero for a single image) and may be singular: fewer images than features are allowed, but bias the distance upwards, so compare
    sets of equal size.

    Args:
        real: (R, F).
        made: (N, F).
    """
    (mean, root), (other_mean, other_root) = _normal(real), _normal(made)
    # The trace of (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T where S = R^T R: no root of a near-zero eigenvalue is taken.
    shared = torch.linalg.svdvals(root @ other_root.T).sum()
    return float(((mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * shared).clamp_min(0))


def _normal(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (F,) and a matrix R of at most F rows whose R^T R is the covariance."""
    mean = features.mean(0)
    root = (features - mean) / max(len(features) - 1, 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


@torch.no_grad()
def _observed(teacher: nn.Module, images: Tensor, batch: int, features: Features | None) -> Observation:
    device = device_of(teacher)
    with frozen(teacher):
        parts = [observe(teacher, part.to(device), features=features) for part in images.split(batch)]
    logits, seen = (torch.cat([part[place] for part in parts]) for place in (0, 2))
    return Observation(logits, parts[0].statistics, seen.double())
