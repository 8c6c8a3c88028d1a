"""Building networks by name, from settings or from a received description."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.models import alexnet, cnn, from_torchvision, lenet, resnet, vgg, wide_resnet
from fedimpr.models.architecture import Architecture, Shape
from fedimpr.turns import QUARTERS

_ARCHITECTURES: dict[str, Architecture] = {
    name: architecture for family in (lenet, cnn, alexnet, resnet, wide_resnet, vgg) for name, architecture in family.ARCHITECTURES.items()
}


class Classifier(nn.Module):
    """A network behind the normalisation it was trained with.

    Mean and standard deviation follow the module to its device but stay out of its state dict, which holds the network alone.

    Args:
        network: maps normalised images (N, C, H, W) to logits (N, K).
        mean: per channel that the network takes, of images in [0, 1]. One grey channel is repeated to as many as there are means.
        std: as ``mean``, > 0.
        spec: the JSON-able arguments of :func:`build` but the seed; :func:`rebuild` takes them.

    Attributes:
        turned: whether the network has an output for each class in each quarter turn (see :mod:`fedimpr.turns`). The classifier looks at an
            image in all four turns: its answer is their mean (aggregated inference; Lee et al., ICML 2020, section 2.3).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], spec: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.spec = network, spec
        self.turned = bool(spec.get("options", {}).get("turned", False))
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        images = (images - self.mean) / self.std
        if not self.turned:
            logits: Tensor = self.network(images)
            return logits
        in_turns = self.network(torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(QUARTERS)]))
        return torch.stack([of_turn[:, quarters::QUARTERS] for quarters, of_turn in enumerate(in_turns.chunk(QUARTERS))]).mean(0)


def in_every_turn(model: nn.Module) -> nn.Module:
    """The same network with all its outputs: a model of 4 K classes, if ``model`` is a :class:`Classifier` that knows them in every turn.

    They share their weights. Any other model is its own answer.
    """
    if not isinstance(model, Classifier) or not model.turned:
        return model
    whole = copy.copy(model)  # of the module, not of what it holds
    options = {key: value for key, value in model.spec["options"].items() if key != "turned"}
    whole.turned, whole.spec = False, {**model.spec, "classes": QUARTERS * model.spec["classes"], "options": options}
    return whole


def names() -> tuple[str, ...]:
    """The names of the networks that live here; ``torchvision/<name>`` comes on top."""
    return tuple(_ARCHITECTURES)


def build(name: str, *, shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float], seed: int, **options: Any) -> Classifier:
    """Make a classifier with fresh weights.

    Args:
        name: one of :func:`names`, or ``torchvision/<name>`` for a classifier of torchvision.
        shape: (C, H, W) of the images.
        classes: K, at least 2.
        mean: (C,) of the training images in [0, 1].
        std: (C,), > 0.
        seed: decides the initial weights; the global random state is left alone.
        **options: what the architecture leaves open, e.g. ``batch_norm`` of ``lenet5``; and ``turned``, for any: whether the network has an
            output for each class in each quarter turn.

    Raises:
        ConfigError: a setting is unknown, missing or out of range, or the images are too small for the network.
    """
    architecture = _find(name)
    shape = _checked_shape(shape, name, architecture)
    if classes < 2:
        raise ConfigError("dataset.classes", classes, "a whole number >= 2")
    mean, std = _per_channel("dataset.mean", mean, shape[0]), _per_channel("dataset.std", std, shape[0])
    if min(std) <= 0:
        raise ConfigError("dataset.std", std, "numbers > 0")
    _check_options(options, name, architecture)
    turned, own = options.get("turned", False), {key: value for key, value in options.items() if key != "turned"}
    if turned and shape[1] != shape[2]:
        raise ConfigError("model.options.turned", True, f"false for images of {shape[1]}x{shape[2]} pixels: turned they have another shape")
    with seeds.isolated(seed):
        network = architecture.make(shape, classes * (QUARTERS if turned else 1), **own)
    repeat = (architecture.channels or shape[0]) // shape[0]
    spec = {"name": name, "shape": list(shape), "classes": classes, "mean": mean, "std": std, "options": dict(options)}
    return Classifier(network, mean * repeat, std * repeat, spec)


def rebuild(spec: dict[str, Any]) -> Classifier:
    """Make the classifier that ``spec`` describes, e.g. :attr:`Classifier.spec` after a round trip through JSON; its weights are arbitrary.

    Raises:
        ConfigError: as :func:`build`, or the description lacks an entry.
    """
    try:
        name, options = spec["name"], spec["options"]
        rest = {key: spec[key] for key in ("shape", "classes", "mean", "std")}
    except (KeyError, TypeError):
        raise ConfigError("spec", spec, "a mapping with name, shape, classes, mean, std and options") from None
    return build(name, seed=0, **rest, **options)


def final_layer(model: nn.Module) -> nn.Linear:
    """The layer that makes the logits: the last ``nn.Linear`` in module order.

    Raises:
        TeacherError: there is none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        remedy = "Use a model that ends in torch.nn.Linear, or a method that does not look at the final layer."
        raise TeacherError("the model has no linear layer that makes the logits", value=type(model).__name__, remedy=remedy)
    return layers[-1]


def _find(name: str) -> Architecture:
    if name.startswith("torchvision/"):
        return from_torchvision.find(name.removeprefix("torchvision/"))
    if name not in _ARCHITECTURES:
        raise ConfigError("model.name", name, f"one of {', '.join(names())}, or torchvision/<name>")
    return _ARCHITECTURES[name]


def _checked_shape(shape: Shape, name: str, architecture: Architecture) -> Shape:
    try:
        channels, height, width = (int(side) for side in shape)
    except (TypeError, ValueError):
        raise ConfigError("dataset.shape", shape, "three whole numbers: channels, height, width") from None
    if channels < 1 or min(height, width) < architecture.least:
        least = f"{architecture.least}x{architecture.least}"
        raise ConfigError("dataset.shape", [channels, height, width], f"at least {least} pixels for {name}")
    if architecture.channels not in (None, channels) and channels != 1:
        raise ConfigError("dataset.shape", [channels, height, width], f"1 or {architecture.channels} channels for {name}")
    return channels, height, width


def _check_options(options: dict[str, Any], name: str, architecture: Architecture) -> None:
    taken = inspect.signature(architecture.make, eval_str=True)
    try:
        taken.bind(None, None, **{key: value for key, value in options.items() if key != "turned"})
    except TypeError as error:
        raise ConfigError("model.options", options, f"the options of {name}; {error}") from None
    kinds = {"turned": bool, **{key: parameter.annotation for key, parameter in taken.parameters.items()}}
    for key, value in options.items():
        kind = kinds.get(key)  # None of torchvision's, which looks at them itself
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(f"model.options.{key}", value, "true or false")
        if kind is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"model.options.{key}", value, "a whole number >= 1")


def _per_channel(key: str, values: Sequence[float], channels: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != channels:
        raise ConfigError(key, numbers, f"{channels} numbers, one a channel")
    return numbers
