"""States as flat mappings of tensors: what safetensors can hold, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def size_of(state: Mapping[str, Tensor]) -> int:
    """The bytes of all its tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def to_note(facts: object) -> Tensor:
    """What is no tensor, as JSON in bytes: (length,), uint8."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def from_note(note: Tensor) -> Any:
    """What :func:`to_note` was given."""
    return json.loads(bytes(note.tolist()))
