"""How useful each source is for a target, as the target sees it.

The consensus focus of KD3A (Feng et al., ICML 2021, arXiv 2011.09757): what the sources' consensus on the target's images loses without one
of them. It looks at the target's own images and at no label, so it can be taken where the images are, and only one number a source leaves
the client. A source that was trained on another order of the labels contradicts the others and gains nothing; one with many wrong labels is
seldom sure and has no voice. Of two sources that contradict each other none is known to be right: this takes three.

Differences: the focus is divided by the number of images, so that it can be averaged over clients by their numbers of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedimpr.adaptation.batch_norm import reestimate, restore, statistics_of
from fedimpr.adaptation.consensus import KnowledgeVote
from fedimpr.adaptation.learning import predictions, whole


class Survey(NamedTuple):
    """What M source models are to a target.

    Attributes:
        focus: (M,), the consensus focus an image.
        statistics: for each source model its batch-norm statistics on the target's images, by name; empty for a model without batch norm.
    """

    focus: Tensor
    statistics: list[dict[str, Tensor]]


def survey(sources: Sequence[nn.Module], pixels: Tensor, *, vote: KnowledgeVote, batch_size: int) -> Survey:
    """Look at all source models with a target's images; the models are left as they are.

    Args:
        sources: M models.
        pixels: uint8, (N, C, H, W), N >= 2.
        vote: decides the consensus.
        batch_size: of the passes that take batch-norm statistics.
    """
    answers = torch.stack([predictions(source, pixels) for source in sources])
    statistics = [_statistics(source, pixels, batch_size) for source in sources]
    return Survey(vote.focus(answers) / len(pixels), statistics)


def _statistics(source: nn.Module, pixels: Tensor, batch_size: int) -> dict[str, Tensor]:
    if not statistics_of(source):
        return {}
    parts = whole(torch.arange(len(pixels)), batch_size)
    before = reestimate(source, (pixels[part].float() / 255 for part in parts), momentum=None)
    after = statistics_of(source)
    restore(source, before)
    return after
