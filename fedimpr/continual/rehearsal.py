"""What a model learns beside a new task, so that it does not forget the earlier ones.

One value holds the weights of all terms; a term of weight 0 is not computed. The published methods are settings of it:

* *Learning without Forgetting*: Li, Hoiem, ECCV 2016 (arXiv 1606.09282); federated as FedLwF.
* TARGET: Zhang, Chen, Zhuang, Lyu, ICCV 2023 (arXiv 2303.06937).
* MFCL: Babakniya, Fabian, He, Soltanolkotabi, Avestimehr, NeurIPS 2023 (arXiv 2311.07784), whose loss is that of *Always Be Dreaming*:
  Smith, Hsu, Balloch, Shen, Jin, Kira, ICCV 2021 (arXiv 2106.09701).
* LANDER: Tran, Le, Le, Harandi, Phung, CVPR 2024 (arXiv 2403.14101).

Differences: LANDER's anchors are a language model's embeddings of the classes' names, onto which a learnt layer projects the features. Here
the user brings the embeddings in a file, or the anchors are directions drawn from a seed; they are of the features' own size, and no
projection is learnt. Embeddings are centred, since those of any two names lie close together, and projected at random.

A model that knows its classes in every quarter turn (:mod:`fedimpr.turns`) learns all of this with each class in each turn as a class of
its own: own and remembered images are shown upright and in one other turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.embeddings import of_outputs, read_embeddings
from fedimpr.errors import ConfigError
from fedimpr.models import final_layer, in_every_turn
from fedimpr.observation import Observation, observe
from fedimpr.synthesis.base import require
from fedimpr.training import Lesson
from fedimpr.turns import QUARTERS, outputs_of, with_turned
from fedimpr.views import Views


class Memory(NamedTuple):
    """Images that stand for the past.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), the class that each shows, or should.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The loss of a model that learns a task and remembers what was before.

    Attributes:
        own: the classes among which the task's own images are told apart: ``"all"`` that are known, or those of the ``"task"``.
        distil_own: weight of the previous model's answers to the task's own images (LwF).
        replay_labels: weight of the cross-entropy of remembered images, among all known classes.
        replay_distil: weight of the previous model's answers to remembered images (TARGET).
        features: weight of the squared difference to the previous model's features, as far as its head looks at them, on own and
            remembered images (MFCL).
        head: weight of the cross-entropy of own and remembered images among all known classes that the head alone learns from (MFCL).
        anchors: weight of how far features lie outside of the ball around their class's anchor (LANDER).
        radius: of that ball, in units of a feature's root mean square.
        embeddings: a file with those of the classes' names (:mod:`fedimpr.embeddings`), of which anchors are made; or ``None``: they
            are drawn.
        temperature: of the answers that are distilled.
        batch_size: remembered images a step.
        views: augmentation of remembered images.
    """

    own: Literal["all", "task"]
    distil_own: float
    replay_labels: float
    replay_distil: float
    features: float
    head: float
    anchors: float
    radius: float
    embeddings: str | None
    temperature: float
    batch_size: int
    views: Views

    def __post_init__(self) -> None:
        weights = ("distil_own", "replay_labels", "replay_distil", "features", "head", "anchors")
        require(self, above_zero=("temperature", "batch_size"), at_least_zero=(*weights, "radius"))
        if self.own not in ("all", "task"):
            raise ConfigError("own", self.own, "'all' or 'task'")
        if self.embeddings is not None and self.anchors == 0:
            raise ConfigError("embeddings", self.embeddings, "null where nothing is drawn to anchors (anchors: 0)")
        _ = self.names  # a file that cannot be read is refused now

    @cached_property
    def names(self) -> Tensor | None:
        """(K, E): the embeddings in the file, if there is one."""
        return None if self.embeddings is None else read_embeddings(self.embeddings)

    @property
    def needs_previous(self) -> bool:
        """Whether it asks the model of the step before."""
        return self.distil_own > 0 or self.replay_distil > 0 or self.features > 0

    @property
    def needs_memory(self) -> bool:
        """Whether it looks at remembered images."""
        return self.replay_labels > 0 or self.replay_distil > 0 or self.features > 0 or self.head > 0

    def bound(self, task: Tensor, previous: nn.Module | None, memory: Memory | None, seed: int, order: Sequence[int]) -> Lesson:
        """The lesson of a task.

        Args:
            task: (J,), the classes of the task's own images.
            previous: the model of the step before, in eval mode, on the device of the one that learns; ``None`` in the first step.
            memory: remembered images; ``None`` where there are none.
            seed: of the anchors.
            order: the number that each class has in the data set: the row of its embedding.
        """
        earlier = None if previous is None else in_every_turn(previous)
        centres: Tensor | None = None

        def lesson(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            nonlocal centres
            whole = in_every_turn(model)
            turned = whole is not model
            shown, names = with_turned(images, labels, generator) if turned else (images, labels)
            count, own = len(shown), task.to(labels.device)
            if memory is not None and self.needs_memory:
                places = torch.randint(len(memory.labels), (self.batch_size,), generator=generator)
                remembered = self.views(memory.images[places].to(images.device).float() / 255, generator)
                named = memory.labels[places].to(labels.device)
                if turned:
                    remembered, named = with_turned(remembered, named, generator)
                shown, names = torch.cat([shown, remembered]), torch.cat([names, named])
            # One pass for both: batch norm then sees the past as well.
            deep = self.features > 0 or self.head > 0 or self.anchors > 0
            seen = observe(whole, shown, features="penultimate" if deep else None)
            before = None
            if earlier is not None and self.needs_previous:
                with torch.no_grad():
                    before = observe(earlier, shown, features="penultimate" if self.features > 0 else None)
            if self.anchors > 0 and centres is None:  # once for the whole task
                rows = None if self.names is None else of_outputs(self.names - self.names.mean(0), order, QUARTERS if turned else 1)
                outputs, size = seen.logits.shape[1], seen.features.shape[1]
                centres = anchors(outputs, size, seed) if rows is None else named_anchors(rows[:outputs], size, seed)
                centres = centres.to(labels.device)
            loss = self._loss(whole, seen, names, count, outputs_of(own) if turned else own, before, earlier, centres)
            logits = seen.logits[: len(images)]
            return loss, logits[:, ::QUARTERS] if turned else logits  # how it does with upright images alone, which costs nothing more

        return lesson

    def _loss(
        self,
        model: nn.Module,
        seen: Observation,
        labels: Tensor,
        count: int,
        task: Tensor,
        before: Observation | None,
        previous: nn.Module | None,
        centres: Tensor | None,
    ) -> Tensor:
        """The sum of all terms; the first ``count`` images are the task's own, the others are remembered."""
        logits, replayed = seen.logits, len(labels) > count
        loss = _among(logits[:count], labels[:count], task) if self.own == "task" else F.cross_entropy(logits[:count], labels[:count])
        if self.replay_labels > 0 and replayed:
            loss = loss + self.replay_labels * F.cross_entropy(logits[count:], labels[count:])
        if before is not None and self.distil_own > 0:
            loss = loss + self.distil_own * self._distil(logits[:count], before.logits[:count])
        if before is not None and self.replay_distil > 0 and replayed:
            loss = loss + self.replay_distil * self._distil(logits[count:], before.logits[count:])
        if before is not None and previous is not None and self.features > 0:
            head = final_layer(previous)
            gap = (seen.features - before.features) @ head.weight.T.detach()
            loss = loss + self.features * gap.square().mean()
        if self.head > 0 and replayed:
            loss = loss + self.head * F.cross_entropy(final_layer(model)(seen.features.detach()), labels)
        if centres is not None:
            distance = (seen.features - centres[labels]).norm(dim=1) / math.sqrt(centres.shape[1])
            loss = loss + self.anchors * (distance - self.radius).clamp_min(0).mean()
        return loss

    def _distil(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """The divergence of the answers from the previous model's among the classes that it knew, at the temperature, times its square."""
        t = self.temperature
        mine, previous = F.log_softmax(logits[:, : wanted.shape[1]] / t, 1), F.log_softmax(wanted / t, 1)
        divergence: Tensor = F.kl_div(mine, previous, reduction="batchmean", log_target=True)
        return divergence * t * t


def anchors(classes: int, size: int, seed: int) -> Tensor:
    """(K, F): a direction for each class, of root mean square 1; that of a class does not depend on how many there are."""
    drawn = [torch.randn(size, generator=seeds.generator(seed, "anchors", k)) for k in range(classes)]
    return _of_size_one(torch.stack(drawn))


def named_anchors(embeddings: Tensor, size: int, seed: int) -> Tensor:
    """(K, F): the direction of each embedding (K, E) in a random projection that is the same for all, of root mean square 1.

    The angles between them are about those between the embeddings (Johnson, Lindenstrauss, 1984).
    """
    projection = torch.randn(embeddings.shape[1], size, generator=seeds.generator(seed, "anchors"))
    return _of_size_one(embeddings @ projection)


def _of_size_one(rows: Tensor) -> Tensor:
    """The same directions, of root mean square 1."""
    unit: Tensor = F.normalize(rows, dim=1)
    return unit * math.sqrt(rows.shape[1])


def _among(logits: Tensor, labels: Tensor, task: Tensor) -> Tensor:
    """The cross-entropy among the classes of a task, whose labels these are."""
    place = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    place[task] = torch.arange(len(task), device=logits.device)
    return F.cross_entropy(logits[:, task], place[labels])
