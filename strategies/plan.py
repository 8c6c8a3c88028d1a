"""A synchronous round before anybody trains, and what rounds have cost so far."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedimpr.errors import UpdateError
from strategies.cohort import cohort_of
from strategies.devices import STAGE, Turn
from strategies.federation import Federation
from strategies.records import shared
from strategies.watch import Bill, Charge


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A synchronous round.

    Attributes:
        asked: the partitions that train, by node.
        left_out: why the others of the cohort do not.
        minimum: of good updates.
        down: bytes that each of the cohort is sent.
        turns: of each of the cohort; empty without devices.
    """

    asked: dict[int, list[int]]
    left_out: Sequence[UpdateError]
    minimum: int
    down: Mapping[int, int]
    turns: Mapping[int, Turn]

    @property
    def seconds(self) -> float:
        """How long the round lasts on the virtual clock: until everybody has answered or vanished, or the deadline has passed."""
        return max((turn.seconds for turn in self.turns.values()), default=0.0)

    def charge(self, partition: int, up: Mapping[int, int]) -> Charge:
        """What a partition's turn cost, of which ``up`` bytes have come."""
        down, turn = self.down[partition], self.turns.get(partition)
        return Charge(down, up[partition]) if turn is None else Charge(down, up[partition], turn.device, turn.seconds)


def planned(
    federation: Federation, nodes: Sequence[int], round: int, minimum: int | None, size: int, among: Collection[int] | None = None
) -> Plan:
    """Draw a round's cohort and look ahead on the virtual clock: whose update would not come in time does not train at all.

    Those are told to the watch, and so are, in the first round, the devices that have too little memory. Without devices everybody trains.

    Args:
        federation: who takes part.
        nodes: in the order of places.
        round: counted from 1.
        minimum: of good updates; ``None``: as many as the cohort has.
        size: of the weights in bytes. What a node is sent once for several clients is shared by them; a device has a line of its own.
        among: the partitions that have work in this round; ``None``: all.

    Raises:
        UpdateError: fewer updates can come than the minimum.
    """
    fleet, cohort = federation.fleet, cohort_of(federation, nodes, round, among)
    drawn = [partition for partitions in cohort.values() for partition in partitions]
    least = max(1, len(drawn)) if minimum is None else minimum
    if fleet is None:
        down = {partition: part for partitions in cohort.values() for partition, part in shared(size, partitions).items()}
        return Plan(asked=cohort, left_out=[], minimum=least, down=down, turns={})
    if round == 1:
        tell_unable(federation)
    turns = {partition: fleet.turn(round, partition) for partition in drawn}
    left_out = [lost(partition, round, cause) for partition, turn in turns.items() if (cause := turn.cause) is not None]
    for error in left_out:
        federation.watch.excluded(error)
    if len(drawn) - len(left_out) < least:
        raise UpdateError(
            f"{len(drawn) - len(left_out)} updates can come of {len(drawn)} clients that are there, below strategy.minimum_updates = "
            f"{'null, all of them' if minimum is None else minimum}" + (f"; first: {left_out[0]}" if left_out else ""),
            round=round,
            stage=STAGE,
            remedy="Lower strategy.minimum_updates, raise the deadline, or choose other devices.",
        )
    asked = {node: [partition for partition in partitions if turns[partition].cause is None] for node, partitions in cohort.items()}
    asked = {node: partitions for node, partitions in asked.items() if partitions}
    return Plan(asked=asked, left_out=left_out, minimum=least, down=dict.fromkeys(drawn, size), turns=turns)


def lost(partition: int, round: int, cause: str) -> UpdateError:
    """Why a client's update does not come, or is not used."""
    return UpdateError(cause, client=partition, round=round, stage=STAGE)


def tell_unable(federation: Federation) -> None:
    """Tell the watch who has too little memory ever to take part."""
    if (fleet := federation.fleet) is not None:
        for partition in range(federation.clients):
            if not fleet.able(partition):
                device, needed = fleet.devices[partition], fleet.loads[partition].memory / 1e6
                told = f"its {device.name} has {device.memory_mb:.4g} MB for training, which takes {needed:.4g} MB: it never takes part"
                federation.watch.excluded(lost(partition, 1, told))


class Ledger:
    """What all rounds so far have cost; it goes out and in with a strategy's state.

    Args:
        federation: with devices there is a clock.
    """

    def __init__(self, federation: Federation) -> None:
        self.down = self.up = 0
        self.seconds = None if federation.fleet is None else 0.0

    def bill(self, down: int, up: int, seconds: float) -> Bill:
        """Take in a round: its bytes, and how long it lasted on the virtual clock, which counts with devices only."""
        self.down, self.up = self.down + down, self.up + up
        self.seconds = None if self.seconds is None else self.seconds + seconds
        return Bill(down, up, self.down, self.up, self.seconds)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it."""
        seconds = {} if self.seconds is None else {"ledger/seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        return {"ledger/bytes": torch.tensor([self.down, self.up]), **seconds}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.down, self.up = state["ledger/bytes"].tolist()
        self.seconds = None if self.seconds is None else state["ledger/seconds"].item()
