"""What is kept of a round that is not over, so that a run that was stopped in it goes on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedimpr.errors import UpdateError
from fedimpr.states import from_note, to_note, under
from fedimpr.update import Update

UPDATES = "updates"  # the part of a round that is kept first


class Keep(Protocol):
    """Where the parts of a round that is not over are kept, so that a run that was stopped in it goes on from there.

    A strategy keeps the updates of all clients as :data:`UPDATES`, and whatever else takes long under names of its own.
    """

    def holds(self, round: int, part: str) -> bool:
        """Whether the part is there, and whole."""

    def load(self, round: int, part: str) -> Mapping[str, Tensor]:
        """What was saved last of the part; empty where there is nothing."""

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
    """

    updates: Sequence[Update]
    excluded: Sequence[UpdateError]
    seconds: float
    sent: Mapping[int, int]

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors: everything but weights and label counts as JSON in bytes."""
        state: dict[str, Tensor] = {}
        facts = []
        for update in self.updates:
            state |= {f"{update.partition}/weights/{name}": tensor for name, tensor in update.weights.items()}
            if update.label_counts is not None:
                state[f"{update.partition}/label_counts"] = update.label_counts
            facts.append({key: getattr(update, key) for key in ("partition", "round", "examples", "metrics")})
        told = {"excluded": [_told(error) for error in self.excluded], "seconds": self.seconds, "sent": list(self.sent.items())}
        return {**state, "note": to_note({"updates": facts, **told})}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Received:
        """What :meth:`state_dict` gave."""
        note = from_note(state["note"])
        updates = [
            Update(
                **facts,
                weights=under(state, f"{facts['partition']}/weights/"),
                label_counts=state.get(f"{facts['partition']}/label_counts"),
            )
            for facts in note["updates"]
        ]
        return cls(updates, [UpdateError(**told) for told in note["excluded"]], note["seconds"], dict(note["sent"]))


def _told(error: UpdateError) -> dict[str, object]:
    """What an error of the same text is made of; the value, which may be anything, goes into the problem."""
    problem = error.problem if error.value is None else f"{error.problem} (value {error.value!r})"
    return {"problem": problem, "stage": error.stage, "client": error.client, "round": error.round, "remedy": error.remedy}
