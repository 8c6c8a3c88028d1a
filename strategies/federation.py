"""What every strategy needs to know of its federation, and the few steps that all share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from flwr.app import Message
from torch import Tensor, nn

from fedimpr.errors import ConfigError, UpdateError
from fedimpr.update import Update
from strategies.records import Instruction
from strategies.watch import Watch

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


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What every strategy needs to know of its federation.

    Attributes:
        clients: how many there are.
        clients_per_node: how many neighbouring partitions a node hosts; the last node may host fewer.
        cohort: how many of them take part in a round; ``None``: all.
        seed: of the run.
        settings: the run's configuration as JSON, sent to every client.
        build: a fresh model of the architecture of a partition; ``None`` asks for the global one.
        reference: a state dict of that architecture, of which names, shapes and types count.
        shape: (C, H, W).
        device: where the server computes.
        watch: who watches.
        keep: where parts of a round are kept.
    """

    clients: int
    clients_per_node: int
    cohort: int | None
    seed: int
    settings: str
    build: Callable[[int | None], nn.Module]
    reference: Callable[[int | None], Mapping[str, Tensor]]
    shape: tuple[int, int, int]
    device: torch.device
    watch: Watch
    keep: Keep = field(default_factory=Nowhere)

    @property
    def nodes(self) -> int:
        """How many nodes host the clients."""
        return -(-self.clients // self.clients_per_node)

    def minimum(self, updates: int | None) -> int:
        """The good updates below which a round fails; ``None`` asks for all of the cohort's.

        Raises:
            ConfigError: unless 1 <= minimum <= cohort.
        """
        most = self.clients if self.cohort is None else self.cohort
        if updates is not None and not 1 <= updates <= most:
            raise ConfigError("strategy.minimum_updates", updates, f"null or an integer in [1, {most}], the clients of a round")
        return most if updates is None else updates


@dataclass(frozen=True)
class Received:
    """What a round's clients answered.

    Attributes:
        updates: the good ones, in the order of partitions.
        excluded: why the others were left out.
        seconds: from the round's start to the last answer.
    """

    updates: Sequence[Update]
    excluded: Sequence[UpdateError]
    seconds: float

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors: everything but weights and label counts as JSON in bytes."""
        state: dict[str, Tensor] = {}
        facts = []
        for update in self.updates:
            state |= {f"{update.partition}/weights/{name}": tensor for name, tensor in update.weights.items()}
            if update.label_counts is not None:
                state[f"{update.partition}/label_counts"] = update.label_counts
            facts.append({key: getattr(update, key) for key in ("partition", "round", "examples", "metrics")})
        note = json.dumps({"updates": facts, "excluded": [_told(error) for error in self.excluded], "seconds": self.seconds})
        return {**state, "note": torch.tensor(list(note.encode()), dtype=torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Received:
        """What :meth:`state_dict` gave."""
        note = json.loads(bytes(state["note"].tolist()))
        updates = [
            Update(
                **facts,
                weights=under(state, f"{facts['partition']}/weights/"),
                label_counts=state.get(f"{facts['partition']}/label_counts"),
            )
            for facts in note["updates"]
        ]
        return cls(updates, [UpdateError(**told) for told in note["excluded"]], note["seconds"])


def _told(error: UpdateError) -> dict[str, object]:
    """What an error of the same text is made of; the value, which may be anything, goes into the problem."""
    problem = error.problem if error.value is None else f"{error.problem} (value {error.value!r})"
    return {"problem": problem, "stage": error.stage, "client": error.client, "round": error.round, "remedy": error.remedy}


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model with these weights, in eval mode."""
    model.load_state_dict(dict(weights))
    return model.eval()


def instructions(
    federation: Federation, asked: Mapping[int, Sequence[int]], weights: dict[str, Tensor], round: int, *, sums: bool = False
) -> list[Message]:
    """One training message a node that is asked, by ``{node: partitions}``; they share one record."""
    cohort = [partition for partitions in asked.values() for partition in partitions]
    content = Instruction(weights=weights, round=round, settings=federation.settings, cohort=cohort, sums=sums).to_record()
    return [Message(content, node, "train", group_id=str(round)) for node in asked]


def alike(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and shapes."""
    return {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
