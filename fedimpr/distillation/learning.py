"""One step of a student towards its teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedimpr.distillation.objectives import Loss
from fedimpr.observation import Observation, observe


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What students learn from in one step.

    Attributes:
        images: (N, C, H, W), views of impressions.
        places: (N,), of the impressions in their bank.
        wanted: what the teacher sees in them.
    """

    images: Tensor
    places: Tensor
    wanted: Observation


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A student, and what moves its weights.

    Attributes:
        student: in training mode.
        objective: its loss.
        optimiser: of the student's and the objective's parameters.
        batch_size: of so many of the images that it is shown it learns: those on which its logits are the farthest from the wanted ones.
    """

    student: nn.Module
    objective: Loss
    optimiser: torch.optim.Optimizer
    batch_size: int

    def learn(self, shown: Shown) -> Tensor:
        """Take one step; its loss, ()."""
        images, places, wanted = shown.images, shown.places, shown.wanted
        if len(images) > self.batch_size:
            with torch.no_grad():
                chosen = _farthest(self.student, images, wanted.logits, self.batch_size)
                images, places = images[chosen], places[chosen]
                wanted = wanted._replace(logits=wanted.logits[chosen], features=wanted.features[chosen])
        loss: Tensor = self.objective(observe(self.student, images, features=self.objective.features), wanted, places)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def _farthest(student: nn.Module, images: Tensor, wanted: Tensor, count: int) -> Tensor:
    """The places of those images on which a student's logits are the farthest from the wanted ones, by their mean square.

    Its batch norm and its dropout are those of evaluation: whom it does not learn from leaves no trace in it.
    """
    student.eval()
    apart = (observe(student, images).logits - wanted).square().mean(1)
    student.train()
    return apart.topk(count).indices
