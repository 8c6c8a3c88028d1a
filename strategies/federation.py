"""What every strategy needs to know of its federation, and the few steps that all share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Message
from torch import Tensor, nn

from fedimpr.errors import ConfigError
from strategies.crew import Alone, Crew
from strategies.devices import Fleet
from strategies.keep import Keep, Nowhere
from strategies.records import Instruction
from strategies.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What every strategy needs to know of its federation.

    Attributes:
        clients: how many there are.
        clients_per_node: how many neighbouring partitions a node hosts; the last node may host fewer.
        cohort: how many of them take part in a round; ``None``: all.
        seed: of the run.
        settings: the run's configuration as JSON, sent to every client.
        build: a fresh model of the architecture of a partition; ``None`` asks for the global one. A second argument is the number of
            classes, where it is not the data set's.
        reference: a state dict of that architecture, of which names, shapes and types count; with the same arguments.
        shape: (C, H, W).
        device: where the server computes.
        compile: whether what it mines and distils with is compiled, see :func:`fedimpr.observation.compiled`.
        watch: who watches.
        keep: where parts of a round are kept.
        crew: who does the pieces of the server's own work.
        fleet: the clients' devices; ``None``: they are all there, and nobody knows how fast they are.
    """

    clients: int
    clients_per_node: int
    cohort: int | None
    seed: int
    settings: str
    build: Callable[..., nn.Module]
    reference: Callable[..., Mapping[str, Tensor]]
    shape: tuple[int, int, int]
    device: torch.device
    watch: Watch
    compile: bool = False
    keep: Keep = field(default_factory=Nowhere)
    crew: Crew = field(default_factory=Alone)
    fleet: Fleet | None = None

    @property
    def nodes(self) -> int:
        """How many nodes host the clients."""
        return -(-self.clients // self.clients_per_node)

    @property
    def most(self) -> int:
        """The clients of a whole cohort."""
        return self.clients if self.cohort is None else self.cohort

    def check_minimum(self, updates: int | None) -> None:
        """Check the good updates below which a round fails; ``None`` asks for all of the round's.

        Raises:
            ConfigError: unless 1 <= minimum <= cohort.
        """
        if updates is not None and not 1 <= updates <= self.most:
            raise ConfigError("strategy.minimum_updates", updates, f"null or an integer in [1, {self.most}], the clients of a round")


def loaded(model: nn.Module, weights: Mapping[str, Tensor], *, shared: bool = False) -> nn.Module:
    """The model with these weights, or, where they are ``shared``, with these very tensors; in eval mode."""
    model.load_state_dict(dict(weights), assign=shared)
    return model.eval()


def instructions(
    federation: Federation,
    asked: Mapping[int, Sequence[int]],
    weights: dict[str, Tensor],
    round: int,
    *,
    sums: bool = False,
    group: str | None = None,
    beside: Mapping[str, Tensor] | None = None,
    work: str = "",
) -> list[Message]:
    """One training message a node that is asked, by ``{node: partitions}``; they share one record.

    They are of one Flower group, which their replies name as well: ``group``, or else the round. What clients learn from beside
    their own images goes along, by name, and so does ``work``, see :class:`~strategies.records.Instruction`.
    """
    cohort = [partition for partitions in asked.values() for partition in partitions]
    asking = Instruction(
        weights=weights, round=round, settings=federation.settings, cohort=cohort, sums=sums, beside=beside or {}, work=work
    )
    content = asking.to_record()
    return [Message(content, node, "train", group_id=str(round) if group is None else group) for node in asked]


def alike(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and shapes."""
    return {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
