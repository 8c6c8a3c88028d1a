"""A small network that starts from a large one."""

from __future__ import annotations

from torch import nn

from fedimpr.errors import ConfigError
from fedimpr.models.classifier import Classifier


def inherit(smaller: nn.Module, larger: nn.Module) -> None:
    """Give a network the first units of every layer of a larger one, in place.

    Every tensor becomes the leading block of its namesake: weight selection with consecutive elements (Xu et al., "Initializing Models with
    Larger Ones", ICLR 2024, section 3), by which a student begins with part of what its teacher knows. The first kernels of a layer make
    the channels that the first weights of the next one read, behind a ``Flatten`` too, so what was chosen fits together.

    Args:
        smaller: the network that starts, e.g. a ``lenet5_half`` or a narrow ``resnet8``.
        larger: a network of the same layers, each at least as wide, e.g. a ``lenet5`` or a wide ``resnet8``; left as it is.

    Raises:
        ConfigError: the larger network lacks a tensor of the smaller one, or has a smaller one of that name.
    """
    held, taken = larger.state_dict(), {}
    for name, own in smaller.state_dict().items():
        here, there = list(own.shape), list(held[name].shape) if name in held else "missing"
        if there == "missing" or len(there) != len(here) or any(a < b for a, b in zip(there, here, strict=True)):
            wanted = f"a network of the same layers, each at least as wide ({name} is {there} in it and {here} in the smaller one)"
            raise ConfigError("larger", larger.spec["name"] if isinstance(larger, Classifier) else type(larger).__name__, wanted)
        taken[name] = held[name][tuple(slice(side) for side in here)]
    smaller.load_state_dict(taken)
