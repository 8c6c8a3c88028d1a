"""What is kept of a round that is not over, so that a run that was stopped in it goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedimpr.errors import UpdateError
from fedimpr.states import from_note, to_note, under
from fedimpr.update import Update

UPDATES = "updates"  # the part of a round that is kept first


def weights_part(partition: int) -> str:
    """The part with one client's weights, where those of all together are more than memory shall hold."""
    return f"weights {partition}"


class Keep(Protocol):
    """Where the parts of a round that is not over are kept, so that a run that was stopped in it goes on from there.

    A strategy keeps the updates of all clients as :data:`UPDATES`, and whatever else takes long under names of its own.
    """

    def holds(self, round: int, part: str) -> bool:
        """Whether the part is there, and whole."""

    def load(self, round: int, part: str) -> Mapping[str, Tensor]:
        """What was saved last of the part; empty where there is nothing."""

    def mapped(self, round: int, part: str) -> Mapping[str, Tensor]:
        """As :meth:`load`, but tensors take no memory: they are read where they are kept, page by page, and not to be written to."""

    def due(self) -> bool:
        """Whether what was saved last, of any part, is old enough."""

    def save(self, round: int, part: str, state: Mapping[str, Tensor]) -> None:
        """Replace what was saved of the part."""


class Nowhere:
    """Keeps nothing: a round that is stopped begins anew."""

    def holds(self, round: int, part: str) -> bool:
        """Never."""
        return False

    def load(self, round: int, part: str) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def mapped(self, round: int, part: str) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def due(self) -> bool:
        """Never."""
        return False

    def save(self, round: int, part: str, state: Mapping[str, Tensor]) -> None:
        """Forget it."""


@dataclass(frozen=True)
class Part:
    """One part of a round: what :func:`fedimpr.distillation.mine_and_distil` takes to save its state.

    Attributes:
        keep: where it is kept.
        round: counted from 1.
        name: of the part.
    """

    keep: Keep
    round: int
    name: str

    def load(self) -> Mapping[str, Tensor]:
        """As :meth:`Keep.load`."""
        return self.keep.load(self.round, self.name)

    def due(self) -> bool:
        """As :meth:`Keep.due`."""
        return self.keep.due()

    def save(self, state: Mapping[str, Tensor]) -> None:
        """As :meth:`Keep.save`."""
        self.keep.save(self.round, self.name, state)


@dataclass(frozen=True)
class Received:
    """What a round's clients answered.

    Attributes:
        updates: the good ones, in the order of partitions.
        excluded: why the others were left out.
        seconds: from the round's start to the last answer.
        sent: bytes of the tensors that came, by partition; see :class:`strategies.records.Answer`.
        apart: whether each update's weights are kept as a part of their own, see :func:`put_away`.
    """

    updates: Sequence[Update]
    excluded: Sequence[UpdateError]
    seconds: float
    sent: Mapping[int, int]
    apart: bool = False

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors, but for weights that are kept apart: what is no tensor is JSON in bytes."""
        state: dict[str, Tensor] = {}
        facts = []
        for update in self.updates:
            if not self.apart:
                state |= {f"{update.partition}/weights/{name}": tensor for name, tensor in update.weights.items()}
            if update.label_counts is not None:
                state[f"{update.partition}/label_counts"] = update.label_counts
            facts.append({key: getattr(update, key) for key in ("partition", "round", "examples", "metrics")})
        told = {"excluded": [_told(error) for error in self.excluded], "seconds": self.seconds, "sent": list(self.sent.items())}
        return {**state, "note": to_note({"updates": facts, "apart": self.apart, **told})}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], apart: Callable[[int], Mapping[str, Tensor]] | None = None) -> Received:
        """What :meth:`state_dict` gave; ``apart`` gives the weights of a partition that were kept apart."""
        note = from_note(state["note"])
        updates = [
            Update(
                **facts,
                weights=dict(apart(facts["partition"])) if note["apart"] and apart else under(state, f"{facts['partition']}/weights/"),
                label_counts=state.get(f"{facts['partition']}/label_counts"),
            )
            for facts in note["updates"]
        ]
        return cls(updates, [UpdateError(**told) for told in note["excluded"]], note["seconds"], dict(note["sent"]), note["apart"])


def answered(keep: Keep, round: int) -> bool:
    """Whether all that a round's clients answered is there, and whole: :data:`UPDATES`, and the weights that are kept apart from it."""
    if not keep.holds(round, UPDATES):
        return False
    note = from_note(keep.mapped(round, UPDATES)["note"])
    return not note["apart"] or all(keep.holds(round, weights_part(facts["partition"])) for facts in note["updates"])


def put_away(keep: Keep, round: int, partition: int, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Keep a client's weights as a part of their own, and return them as :func:`taken_out` does; copied, where nothing is kept.

    Those of convolutions lie there with the channels last. So a model that computes with them in that layout
    (:func:`fedimpr.devices.placed`) takes them over as they are, without a copy in memory.
    """
    laid = {name: tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor for name, tensor in weights.items()}
    keep.save(round, weights_part(partition), laid)
    return taken_out(keep, round, partition) or {name: tensor.clone() for name, tensor in weights.items()}


def taken_out(keep: Keep, round: int, partition: int) -> Mapping[str, Tensor]:
    """What was :func:`put_away`, as :meth:`Keep.mapped` gives it; empty where nothing is kept."""
    laid = keep.mapped(round, weights_part(partition))
    return {name: tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor for name, tensor in laid.items()}


def _told(error: UpdateError) -> dict[str, object]:
    """What an error of the same text is made of; the value, which may be anything, goes into the problem."""
    problem = error.problem if error.value is None else f"{error.problem} (value {error.value!r})"
    return {"problem": problem, "stage": error.stage, "client": error.client, "round": error.round, "remedy": error.remedy}
