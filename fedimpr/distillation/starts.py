"""Students that set out beside one another: after a while the better half goes on, until one is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedimpr.distillation.objectives import Loss
from fedimpr.errors import ConfigError
from fedimpr.observation import Observation, observe
from fedimpr.synthesis.base import Progress


@dataclass(frozen=True, kw_only=True)
class Starts:
    """Successive halving (Jamieson and Talwalkar, AISTATS 2016) of students that are alike but for their first weights.

    How near a narrow network can come to its teacher hangs on the few kernels that it happens to begin with, and shows early. Only
    impressions are looked at, so this needs no data either.

    Attributes:
        others: students that set out beside the first one, of its architecture and on its device; left as they are when they drop out.
        steps: that all of them take before the half with the smaller losses goes on, >= 1. Those then take twice as many, and so on, each
            on the same views as all others and at the peak of the learning rate. A loss is the mean over the later half of these steps.
    """

    others: Sequence[nn.Module]
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "an integer >= 1")

    @property
    def shared(self) -> int:
        """Steps until one student is left: of the last two, and so of the teacher."""
        return _until_one(1 + len(self.others), self.steps)

    def check(self, student: nn.Module) -> None:
        """Refuse others that are no students of the first one's architecture.

        Raises:
            ConfigError: the tensors of one of them have other names or shapes than the student's.
        """
        wanted = _shapes(student)
        for place, other in enumerate(self.others):
            if _shapes(other) != wanted:
                raise ConfigError(f"starts.others[{place}]", type(other).__name__, "a network of the student's architecture")


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


def last_left(learners: Sequence[Learner], show: Callable[[], Shown], steps: int, progress: Progress) -> nn.Module:
    """The student that is left after successive halving; see :class:`Starts`. A loss that is not finite is the worst.

    Args:
        learners: one or more.
        show: called before each step.
        steps: before the first choice.
        progress: told after each step.
    """
    done, total = 0, _until_one(len(learners), steps)
    while len(learners) > 1:
        losses = torch.zeros(len(learners))
        for step in range(steps):
            shown = show()
            now = torch.stack([learner.learn(shown) for learner in learners])
            if step >= steps // 2:
                losses = losses.to(now.device) + now
            done += 1
            progress("choosing a start", done, total, left=len(learners))
        order = losses.nan_to_num(nan=torch.inf).argsort(stable=True).tolist()
        learners = [learners[place] for place in order[: (len(learners) + 1) // 2]]
        steps *= 2
    return learners[0].student


def _until_one(students: int, steps: int) -> int:
    """Steps of the last two: as many halvings as it takes, each after twice as many steps as the one before."""
    return steps * ((1 << (students - 1).bit_length()) - 1)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _farthest(student: nn.Module, images: Tensor, wanted: Tensor, count: int) -> Tensor:
    """The places of those images on which a student's logits are the farthest from the wanted ones, by their mean square.

    Its batch norm and its dropout are those of evaluation: whom it does not learn from leaves no trace in it.
    """
    student.eval()
    apart = (observe(student, images).logits - wanted).square().mean(1)
    student.train()
    return apart.topk(count).indices
