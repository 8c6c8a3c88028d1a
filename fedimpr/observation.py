"""What a teacher shows while images pass through it: logits, batch-norm statistics, features.

The statistic is the one of DeepInversion (Yin et al., CVPR 2020) in the form that CMI uses (Fang et al., IJCAI 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedimpr.models import final_layer

Features = Literal["batch_norm", "penultimate"]


class Observation(NamedTuple):
    """One pass of images through a teacher.

    Attributes:
        logits: (N, K), unscaled.
        batch_norm: scalar; the sum over batch-norm layers of ``|mean - running_mean|_2 + |var - running_var|_2`` of the layer's input.
            An ensemble gives the mean over its members. Zero where it was not asked for.
        features: (N, F); empty (N, 0) where they were not asked for. An ensemble concatenates its members' features.
    """

    logits: Tensor
    batch_norm: Tensor
    features: Tensor


def observe(teacher: nn.Module, images: Tensor, *, batch_norm: bool = False, features: Features | None = None) -> Observation:
    """Pass images through a teacher and report what its layers saw; no hook outlives the call.

    Args:
        teacher: a model or an :class:`~fedimpr.ensemble.Ensemble`, in eval mode.
        images: (N, C, H, W) in [0, 1].
        batch_norm: whether to compare batch statistics with the running ones.
        features: ``"penultimate"``, the input of the final layer; ``"batch_norm"``, the spatial mean of every batch-norm layer's input,
            concatenated over layers (CMI's instance features); or ``None``.

    Raises:
        TeacherError: the teacher has no final linear layer to take penultimate features from.
    """
    if isinstance(teacher, Observable):
        return teacher.observe(images, batch_norm=batch_norm, features=features)
    return observe_module(teacher, images, batch_norm=batch_norm, features=features)


@runtime_checkable
class Observable(Protocol):
    """A teacher that observes itself because it is made of several modules."""

    def observe(self, images: Tensor, *, batch_norm: bool, features: Features | None) -> Observation:
        """As :func:`observe`."""
        ...


def observe_module(module: nn.Module, images: Tensor, *, batch_norm: bool, features: Features | None) -> Observation:
    """As :func:`observe`, for one module. A pure function of its tensors, so that it may run under ``vmap`` or be checkpointed."""
    distances: list[Tensor] = []
    seen: list[Tensor] = []

    def at_batch_norm(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        x: Tensor = inputs[0]
        if batch_norm:
            axes = [0, *range(2, x.dim())]
            assert layer.running_mean is not None and layer.running_var is not None
            distances.append((x.mean(axes) - layer.running_mean).norm() + (x.var(axes, unbiased=False) - layer.running_var).norm())
        if features == "batch_norm":
            seen.append(x.flatten(2).mean(2) if x.dim() > 2 else x)

    hooks = []
    if batch_norm or features == "batch_norm":
        hooks += [layer.register_forward_pre_hook(at_batch_norm) for layer in batch_norm_layers(module)]
    if features == "penultimate":
        hooks.append(final_layer(module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
    try:
        logits = module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return Observation(
        logits,
        torch.stack(distances).sum() if distances else logits.new_zeros(()),
        torch.cat(seen, 1) if seen else logits[:, :0],
    )


def batch_norm_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a teacher that keep running statistics, in module order."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Put modules into eval mode with gradients off for their parameters, and give both back as they were."""
    parts = [part for module in modules if module is not None for part in module.modules()]
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    modes = [part.training for part in parts]
    gradients = [p.requires_grad for p in parameters]
    try:
        for part in parts:
            part.training = False
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        for p, gradient in zip(parameters, gradients, strict=True):
            p.requires_grad_(gradient)
