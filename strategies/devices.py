"""Unlike devices on a virtual clock: who is there, who drops out, and how long a client's turn takes.

All of it is arithmetic on published speeds and draws that derive from (seed, purpose, round, partition). So it is known before anybody
trains, and the same on every runner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedimpr import seeds
from fedimpr.errors import ConfigError

STAGE = "virtual clock"  # of errors


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of device, in the units of its yaml; MB and Mbit are millions.

    Attributes:
        name: of the kind.
        source: where the numbers come from.
        share: of the clients that have one, relative to the other kinds' shares; >= 0.
        macs_per_second: multiply-accumulates a second that it reaches in training, > 0.
        memory_mb: MB that training may take, > 0.
        down_mbits: Mbit/s from the server, > 0.
        up_mbits: Mbit/s to the server, > 0.
        availability: probability that it can be reached when it is asked, in (0, 1].
        dropout: probability that it vanishes in the middle of a turn, in [0, 1).
    """

    name: str
    source: str
    share: float
    macs_per_second: float
    memory_mb: float
    down_mbits: float
    up_mbits: float
    availability: float
    dropout: float

    def __post_init__(self) -> None:
        for key in ("macs_per_second", "memory_mb", "down_mbits", "up_mbits"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(key, getattr(self, key), "a number > 0")
        if not 0 <= self.share < math.inf:
            raise ConfigError("share", self.share, "a number >= 0")
        if not 0 < self.availability <= 1:
            raise ConfigError("availability", self.availability, "a number in (0, 1]")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", self.dropout, "a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one turn asks of a client's device.

    Attributes:
        macs: multiply-accumulates of its training, all images and epochs.
        memory: bytes that training takes.
        down: bytes that it is sent.
        up: bytes that it sends.
    """

    macs: float
    memory: int
    down: int
    up: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A client's turn on the virtual clock, in seconds from its start.

    Attributes:
        device: the name of its kind.
        download: that the weights take.
        training: that it trains.
        upload: that the update takes.
        seconds: until the update is there, or else until the server knows that none will come: the device vanishes, or the deadline passes.
        cause: why no update comes; ``None`` where one does.
    """

    device: str
    download: float
    training: float
    upload: float
    seconds: float
    cause: str | None


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The devices of a federation.

    Attributes:
        devices: by partition.
        loads: what a turn asks of each.
        training_jitter: standard deviation of the logarithm of a factor on the time of training, drawn for each turn; its median is 1.
        network_jitter: the same of a factor on download and upload.
        deadline: seconds after which a turn is given up, > 0; ``None``: never.
        seed: of the run.
    """

    devices: Sequence[Device]
    loads: Sequence[Load]
    training_jitter: float
    network_jitter: float
    deadline: float | None
    seed: int

    def __post_init__(self) -> None:
        for key in ("training_jitter", "network_jitter"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(key, getattr(self, key), "a number >= 0")

    def able(self, partition: int) -> bool:
        """Whether training fits into the device's memory; who is not able never takes part."""
        return self.loads[partition].memory <= self.devices[partition].memory_mb * 1e6

    def there(self, round: int, partition: int) -> bool:
        """Whether the device can be reached in a round, or when an asynchronous server asks for the ``round``-th time."""
        availability = self.devices[partition].availability
        if availability == 1:
            return True
        source = seeds.generator(self.seed, "availability", round, partition)
        return float(torch.rand((), dtype=torch.float64, generator=source)) < availability

    def turn(self, round: int, partition: int) -> Turn:
        """The device's turn of a round, or after that asking."""
        device, load = self.devices[partition], self.loads[partition]
        source = seeds.generator(self.seed, "turn", round, partition)
        chance, moment = torch.rand(2, dtype=torch.float64, generator=source).tolist()
        for_training, for_network = torch.randn(2, dtype=torch.float64, generator=source).tolist()
        network = math.exp(self.network_jitter * for_network)
        download = network * 8 * load.down / (1e6 * device.down_mbits)
        training = math.exp(self.training_jitter * for_training) * load.macs / device.macs_per_second
        upload = network * 8 * load.up / (1e6 * device.up_mbits)
        whole = download + training + upload
        vanishes = moment * whole if chance < device.dropout else math.inf
        deadline = math.inf if self.deadline is None else self.deadline
        seconds, cause = min(whole, vanishes, deadline), None
        if vanishes < min(whole, deadline):
            cause = f"its {device.name} dropped out after {vanishes:.4g} s of a turn of {whole:.4g} s"
        elif whole > deadline:
            cause = f"its {device.name} is late: the turn takes {whole:.4g} s, and the deadline is {deadline:.4g} s"
        return Turn(device=device.name, download=download, training=training, upload=upload, seconds=seconds, cause=cause)


def dealt(kinds: Sequence[Device], clients: int, seed: int) -> list[Device]:
    """A device for each partition: every kind as often as its share says, to less than one client, in an order drawn from the seed.

    Raises:
        ConfigError: no kind has a share.
    """
    total = sum(kind.share for kind in kinds)
    if not total > 0:
        raise ConfigError("kinds", [kind.name for kind in kinds], "one kind or more with a share > 0")
    exact = [clients * kind.share / total for kind in kinds]
    counts = [math.floor(number) for number in exact]
    largest = sorted(range(len(kinds)), key=lambda place: counts[place] - exact[place])
    for place in largest[: clients - sum(counts)]:
        counts[place] += 1
    hand = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    return [hand[place] for place in torch.randperm(clients, generator=seeds.generator(seed, "devices")).tolist()]
