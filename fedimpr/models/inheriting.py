"""A small network that starts from a large one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fedimpr.errors import ConfigError
from fedimpr.models.classifier import Classifier


def inherit(smaller: nn.Module, larger: nn.Module, generator: torch.Generator | None = None) -> None:
    """Give a network some units of every layer of a larger one, in place.

    Every tensor becomes a block of its namesake: weight selection (Xu et al., "Initializing Models with Larger Ones", ICLR 2024,
    section 3), by which a student begins with part of what its teacher knows. The kernels that a layer keeps make the channels that the
    kept weights of the next one read, behind a ``Flatten`` too, so what was chosen fits together. Layers of the same two widths keep the
    same units, as those that meet in a residual sum must.

    Where the larger network has batch norm and the smaller one has none, each is counted into the convolution before it (in evaluation
    it is a factor and a sum a channel).

    Args:
        smaller: the network that starts, e.g. a ``lenet5_half`` or a narrow ``resnet8``.
        larger: a network of the same layers, each at least as wide, e.g. a ``lenet5`` or a wide ``resnet8``; left as it is.
        generator: draws the units; ``None`` takes the first ones. A layer that keeps all of its units keeps their order.

    Raises:
        ConfigError: the larger network lacks a tensor of the smaller one, or has a smaller one of that name.
    """
    own, held = smaller.state_dict(), larger.state_dict()
    if _normalises(larger) and not _normalises(smaller):
        folded = _without_batch_norm(larger)
        held = dict(zip(own, folded, strict=True)) if len(folded) == len(own) else held
    chosen, taken = _Chosen(generator), {}
    for name, tensor in own.items():
        here, there = list(tensor.shape), list(held[name].shape) if name in held else None
        if there is None or len(there) != len(here) or any(a < b for a, b in zip(there, here, strict=True)):
            found = f"{name} is {there or 'missing'} in it and {here} in the smaller one"
            wanted = f"a network of the same layers, each at least as wide ({found})"
            raise ConfigError("larger", larger.spec["name"] if isinstance(larger, Classifier) else type(larger).__name__, wanted)
        block = held[name][tuple(slice(None if axis < 2 else side) for axis, side in enumerate(here))]
        if len(here) > 1:
            block = block[:, chosen.read(here[1], there[1]).to(block.device)]
        taken[name] = block[chosen.made(here[0], there[0]).to(block.device)] if here else block
    smaller.load_state_dict(taken)


class _Chosen:
    """Which units of its layers a network keeps, by their number in both networks."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.kept: dict[tuple[int, int], Tensor] = {}

    def made(self, here: int, there: int) -> Tensor:
        """The units of a layer that makes ``here`` of ``there``."""
        if (here, there) not in self.kept:
            drawn = torch.arange(there) if self.generator is None else torch.randperm(there, generator=self.generator)
            self.kept[here, there] = drawn[:here].sort().values
        return self.kept[here, there]

    def read(self, here: int, there: int) -> Tensor:
        """The inputs of a layer that reads ``here`` of ``there``: the units of an earlier one, or equally many values of each of them."""
        for (fewer, more), units in [((here, there), self.kept.get((here, there))), *reversed(self.kept.items())]:
            if units is not None and here % fewer == 0 and here // fewer * more == there:
                values = here // fewer
                return (units[:, None] * values + torch.arange(values)).flatten()
        return torch.arange(here)


def _normalises(network: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in network.modules())


def _without_batch_norm(network: nn.Module) -> list[Tensor]:
    """The tensors of a network, in order, each batch norm that follows a convolution in that one's kernels and biases."""
    tensors: list[Tensor] = []
    before: nn.Module | None = None
    for layer in network.modules():
        if next(layer.children(), None) is not None:
            continue
        if isinstance(layer, _BatchNorm) and isinstance(before, nn.Conv2d) and layer.running_mean is not None:
            mean, variance = layer.running_mean, layer.running_var
            fused = fuse_conv_bn_weights(before.weight, before.bias, mean, variance, layer.eps, layer.weight, layer.bias)  # type: ignore[arg-type]
            tensors[-1 if before.bias is None else -2 :] = [tensor.detach() for tensor in fused]
        else:
            tensors += layer.state_dict().values()
        before = layer
    return tensors
