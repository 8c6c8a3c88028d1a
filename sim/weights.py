"""Models back from disk: what ``Ensemble.save`` wrote, or a run (``student-*.safetensors`` and the like); and what tells weights apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.models import Classifier, rebuild

WANTED = "a file with a model: what Ensemble.save wrote, or student-*.safetensors of a run"


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes in the order of names: the same for the same bits, on whatever device they are."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_model(path: Path, key: str, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
    """A model in float32, whatever floating type its file has, and its number of classes K; in eval mode, on the CPU.

    Args:
        path: of the file.
        key: the setting that named it, for messages.
        shape: (C, H, W) of the images that the model must take.

    Raises:
        ConfigError: the file is missing or damaged, holds something else, or a model for images of another shape.
        FedimprError: a weight is not finite; the tensor is named.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (OSError, SafetensorError) as error:
        reason = "there is none" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(key, str(path), f"{WANTED} ({reason})") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            remedy = "Give weights without NaN and infinity."
            raise FedimprError(f"tensor {name} of {path} is not finite", stage=f"loading the {key}", remedy=remedy)
    model: nn.Module
    if metadata.get("kind") == "fedimpr.ensemble":
        model = Ensemble.load(path)
        members = list(model.members)
    elif "model" in metadata:
        try:
            model = rebuild(json.loads(metadata["model"]))
            model.load_state_dict(tensors)  # copies into float32
            members = [model]
        except (RuntimeError, ValueError, FedimprError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(key, str(path), f"{WANTED} (its weights do not fit its own description: {reason})") from error
    else:
        raise ConfigError(key, str(path), f"{WANTED} (it does not say what model it holds)")
    specs = [member.spec for member in members if isinstance(member, Classifier)]
    for spec in specs:
        if tuple(spec["shape"]) != shape:
            raise ConfigError("dataset.shape", list(shape), f"{spec['shape']}, the images that {key}={path} takes")
    return model.eval(), int(specs[0]["classes"])
