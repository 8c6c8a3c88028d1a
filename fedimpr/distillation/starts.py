"""Students that set out beside one another: after a while the better half goes on, until one is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedimpr.distillation.learning import Learner, Shown
from fedimpr.errors import ConfigError
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
        order = losses.argsort(stable=True).tolist()  # NaN comes last
        learners = [learners[place] for place in order[: (len(learners) + 1) // 2]]
        steps *= 2
    return learners[0].student


def _until_one(students: int, steps: int) -> int:
    """Steps of the last two: as many halvings as it takes, each after twice as many steps as the one before."""
    return steps * ((1 << (students - 1).bit_length()) - 1)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
