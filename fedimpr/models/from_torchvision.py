"""The classifiers of torchvision; :func:`~fedimpr.models.load_pretrained` takes their published weights from a file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedimpr._torchvision import torchvision
from fedimpr.errors import ConfigError
from fedimpr.models.architecture import Architecture, Shape


def find(name: str) -> Architecture:
    """The classifier that torchvision calls ``name``.

    Raises:
        ConfigError: torchvision has no classifier of this name.
    """
    models = torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError("model.name", f"torchvision/{name}", f"torchvision/ and one of {', '.join(known)}")
    return Architecture(partial(_make, name), least=1, channels=3)


def _make(name: str, shape: Shape, classes: int, **options: Any) -> nn.Module:
    models = torchvision().models
    try:
        # A trial without memory or arithmetic: some networks fix the size of their images, some answer with more than logits.
        with torch.device("meta"):
            trial = models.get_model(name, weights=None, num_classes=classes, **options)
            logits = trial(torch.empty(2, 3, *shape[1:]))
    except (TypeError, ValueError) as error:
        raise ConfigError("model.options", options, f"what torchvision's {name} takes; {error}") from error
    except (RuntimeError, AssertionError) as error:
        least = "x".join(map(str, models.get_model_weights(name).DEFAULT.meta["min_size"]))
        allowed = f"what {name} takes, {least} pixels or more unless an option says less; {error}"
        raise ConfigError("dataset.shape", list(shape), allowed) from error
    if not isinstance(logits, Tensor):
        raise ConfigError("model.options", options, f"options with which {name} answers with logits alone, e.g. aux_logits: false")
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return network
