"""States as flat mappings of tensors: what safetensors can hold, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The types of a safetensors file by their names there.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def size_of(state: Mapping[str, Tensor]) -> int:
    """The bytes of all its tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def write(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state as a safetensors file, one tensor after another: whatever they lie in, one is copied at a time.

    ``safetensors.torch.save_file`` wants them all contiguous at once, which a model in channels-last is not.

    Raises:
        OSError: the file cannot be written.
    """
    ordered = sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0]))  # the widest first: then all are aligned
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in ordered:
        head[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def to_note(facts: object) -> Tensor:
    """What is no tensor, as JSON in bytes: (length,), uint8."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def from_note(note: Tensor) -> Any:
    """What :func:`to_note` was given."""
    return json.loads(bytes(note.tolist()))
