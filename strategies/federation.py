"""What every strategy needs to know of its federation, and the few steps that all share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Message
from torch import Tensor, nn

from fedimpr.errors import ConfigError
from strategies.records import instruction
from strategies.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What every strategy needs to know of its federation.

    Attributes:
        clients: how many there are.
        seed: of the run.
        settings: the run's configuration as JSON, sent to every client.
        build: a fresh model of the architecture of a partition; ``None`` asks for the global one.
        shape: (C, H, W).
        device: where the server computes.
        watch: who watches.
    """

    clients: int
    seed: int
    settings: str
    build: Callable[[int | None], nn.Module]
    shape: tuple[int, int, int]
    device: torch.device
    watch: Watch


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model with these weights, in eval mode."""
    model.load_state_dict(dict(weights))
    return model.eval()


def check_minimum(minimum: int, clients: int) -> None:
    """Raise ConfigError unless 1 <= minimum <= clients."""
    if not 1 <= minimum <= clients:
        raise ConfigError("strategy.minimum_updates", minimum, f"an integer in [1, clients = {clients}]")


def instructions(federation: Federation, hosts: Mapping[int, int], weights: dict[str, Tensor], round: int) -> list[Message]:
    """One training message a host; those of the global architecture share one record."""
    shared, bare = instruction(weights, round, federation.settings), instruction(None, round, federation.settings)
    messages = []
    for partition, node in hosts.items():
        content = shared if alike(federation.build(partition).state_dict(), weights) else bare
        messages.append(Message(content, node, "train", group_id=str(round)))
    return messages


def alike(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and shapes."""
    return {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
