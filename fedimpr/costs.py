"""What training a network costs, counted without computing: a pass over tensors that have shapes and nothing else."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedimpr import seeds


@dataclass(frozen=True)
class TrainingCost:
    """What a network takes from whoever trains it by SGD with momentum.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products, forward and backward, for one image.
        memory: bytes: parameters, their gradients and momentum, buffers, and what a batch's forward pass leaves for the backward pass.
    """

    macs: float
    memory: int


def training_cost(model: nn.Module, shape: tuple[int, int, int], batch_size: int) -> TrainingCost:
    """Count a training step.

    Args:
        model: maps images (N, C, H, W) to logits; it is left as it is.
        shape: (C, H, W).
        batch_size: N, >= 2.
    """
    model = copy.deepcopy(model).to("meta").train()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    own = {_storage(tensor) for tensor in (*parameters, *buffers)}
    left: dict[int, int] = {}

    def seen(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            left[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.empty(batch_size, *shape, device="meta")
    watching = torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor)
    with seeds.isolated(0), FlopCounterMode(display=False) as counter, watching:
        logits: Tensor = model(images)  # alive until all is counted: a storage that is gone may give its address to another one
        logits.sum().backward()
    memory = 3 * sum(tensor.nbytes for tensor in parameters) + sum(tensor.nbytes for tensor in buffers) + sum(left.values())
    return TrainingCost(macs=counter.get_total_flops() / 2 / batch_size, memory=memory)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
