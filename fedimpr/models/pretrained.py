"""Weights that the user has: published ones, those of a run, or of a training of their own."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedimpr.errors import ConfigError
from fedimpr.models.classifier import Classifier, final_layer

WANTED = "a file of weights: safetensors, or what torch.save wrote of a state dict"
COUNTER = "num_batches_tracked"  # older files have none, and nothing is computed from it


def load_pretrained(model: Classifier, path: Path, key: str = "path") -> None:
    """Take over the weights of a file, in the model's own floating type.

    A final layer of another number of classes stays as it is, and so do the counters of batch norm where the file has none. Everything else
    has to fit, tensor by tensor: no network is loaded by half. Names are those of the network, or of a
    :class:`~fedimpr.models.Classifier` around it.

    Args:
        model: what :func:`~fedimpr.models.build` made.
        path: of the file: ``*.safetensors``, or else a state dict as torchvision and ``torch.save`` write them.
        key: what the caller calls the path, for messages.

    Raises:
        ConfigError: the file is missing or damaged, holds no state dict, or that of another network; the tensor is named.
        TeacherError: the network ends in no linear layer.
    """
    held = _read(path, key)
    if not all(name.startswith("network.") for name in held):
        held = {f"network.{name}": tensor for name, tensor in held.items()}
    own, last = model.state_dict(), final_layer(model)
    head = {name for name, tensor in model.named_parameters() if any(tensor is parameter for parameter in last.parameters())}
    fresh = {name for name in own if name not in held and name.endswith(COUNTER)}
    if any(name not in held or held[name].shape != own[name].shape for name in head):
        fresh |= head  # weight and bias belong together
    for name in sorted(own.keys() | held.keys() - head):
        if name in fresh:
            continue
        here, there = (list(tensors[name].shape) if name in tensors else "missing" for tensors in (own, held))
        if here != there:
            shown = f"{name.removeprefix('network.')} is {here} in the network and {there} in the file"
            raise ConfigError(key, str(path), f"weights of {model.spec['name']} ({shown})")
        if not bool(held[name].isfinite().all()):
            raise ConfigError(key, str(path), f"weights without NaN and infinity ({name.removeprefix('network.')} has some)")
    model.load_state_dict({**own, **{name: tensor for name, tensor in held.items() if name not in fresh}})


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """The file's tensors by name."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = "there is none" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:200]
        raise ConfigError(key, str(path), f"{WANTED} ({reason})") from error
    if not isinstance(held, Mapping) or not held or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        what = f"entries {', '.join(map(str, list(held)[:3]))}" if isinstance(held, Mapping) else type(held).__name__
        raise ConfigError(key, str(path), f"{WANTED} (this one holds {what})")
    return dict(held)
