"""What clients keep from one of their turns to the next, where a method needs it: tensors, by partition, in files.

A client's app finds what a partition has kept in Flower's ``Context.state``, under :func:`record_of`, and leaves there what it keeps from
now on. Our grids bring it before a turn and take it away after. So it is the same whichever process plays the client, and memory holds
that of the turns under way, however many clients there are: the rest is pages of files, which the system keeps in memory while it has some.

In the folder ``state/clients/`` of the results, ``3/round-00002.safetensors`` is what partition 3 kept after its turn in round 2. A turn in
round r begins with the newest of a round before r. So a run that was stopped goes on from what belongs to the round it goes on from, and a
turn that is made again finds what it found before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedimpr.errors import FedimprError
from fedimpr.states import write
from sim.config import Settings
from strategies.records import read_cohort
from strategies.tensors import from_arrays, to_arrays

KEPT = 3  # a run goes on from one of the last two rounds: what was kept before either must be there, and what the present one leaves


def record_of(partition: int) -> str:
    """The name of a partition's record in ``Context.state``."""
    return f"kept-{partition}"


def kept_in(state: RecordDict, partition: int) -> dict[str, Tensor]:
    """What a partition has kept, out of ``Context.state``; nothing before its first turn."""
    found: Any = state.get(record_of(partition))  # not by state.array_records: that goes on holding what is removed
    return {} if found is None else from_arrays(found)


class ClientStates:
    """The files of what the clients of a run keep.

    Args:
        results: the result folder.
        clients_per_node: how many neighbouring partitions a node hosts.
    """

    def __init__(self, results: Path, clients_per_node: int) -> None:
        self.folder, self.clients_per_node = results / "state" / "clients", clients_per_node

    def before(self, partition: int, round: int) -> dict[str, Tensor]:
        """What a partition kept last before a round, as pages of its file; nothing before its first turn.

        Raises:
            FedimprError: the file is damaged.
        """
        for path in reversed(self._files(partition)):
            if (kept_in := _round(path)) < round:
                try:
                    return load_file(path)
                except (SafetensorError, OSError) as error:
                    remedy = "Start the run anew: what this client has kept is lost."
                    problem = f"{path} is damaged: {error}"
                    raise FedimprError(problem, client=partition, round=kept_in, stage="reading what it kept", remedy=remedy) from error
        return {}

    def keep(self, partition: int, round: int, state: dict[str, Tensor]) -> None:
        """Keep what a partition's turn in a round leaves.

        Raises:
            FedimprError: the file cannot be written.
        """
        path = self.folder / str(partition) / f"round-{round:05d}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial, state, {"format": "pt"})
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            problem, remedy = f"cannot write {path}: {error.strerror or error}", "Free some space, then go on with resume=<its folder>."
            raise FedimprError(problem, client=partition, round=round, stage="writing what it keeps", remedy=remedy) from error
        for old in self._files(partition)[:-KEPT]:
            old.unlink()

    def bring(self, message: Message, place: int, state: RecordDict) -> None:
        """Put what the partitions of a place have kept into its ``Context.state``, for those that a training message asks."""
        for round, partition in self._asked(message, place):
            if kept := self.before(partition, round):
                state[record_of(partition)] = to_arrays(kept)

    def take(self, message: Message, place: int, state: RecordDict) -> None:
        """Take what they keep from now on out of it."""
        for round, partition in self._asked(message, place):
            if record_of(partition) in state:
                self.keep(partition, round, kept_in(state, partition))
                del state[record_of(partition)]

    def _asked(self, message: Message, place: int) -> list[tuple[int, int]]:
        """The round of a training message, beside each partition of a place that it asks."""
        if message.metadata.message_type != "train":
            return []
        config: Any = message.content["config"]
        return [(config["round"], partition) for partition in read_cohort(config["cohort"]) if partition // self.clients_per_node == place]

    def _files(self, partition: int) -> Sequence[Path]:
        return sorted((self.folder / str(partition)).glob("round-*.safetensors"))


def states_of(settings: Settings) -> ClientStates | None:
    """Where the clients of a run keep what outlives their turns; nothing, where their training keeps nothing."""
    return ClientStates(settings.folder, settings.clients_per_node) if settings.training.get("momentum_kept") else None


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
