"""What a teacher shows while images pass through it: logits, batch statistics, features.

The statistics are those of DeepInversion (Yin et al., CVPR 2020): mean and variance of every batch-norm layer's input.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedimpr.errors import FedimprError
from fedimpr.models import final_layer

Features = Literal["batch_norm", "penultimate"]


class Observation(NamedTuple):
    """One pass of images through a teacher.

    Attributes:
        logits: (N, K), unscaled.
        statistics: (2, S) mean and variance of the batch at each of the S channels that pass through batch-norm layers, the layers in
            module order; (2, 0) where they were not asked for. An ensemble's members follow each other.
        features: (N, F); (N, 0) where they were not asked for. An ensemble concatenates its members' features.
    """

    logits: Tensor
    statistics: Tensor
    features: Tensor


def observe(
    teacher: nn.Module, images: Tensor, *, statistics: bool = False, features: Features | None = None, counted: int | None = None
) -> Observation:
    """Pass images through a teacher and report what its layers saw; no hook outlives the call.

    Args:
        teacher: a model or an :class:`~fedimpr.ensemble.Ensemble`, in eval mode.
        images: (N, C, H, W) in [0, 1].
        statistics: whether to take batch statistics.
        features: ``"penultimate"``, the input of the final layer; ``"batch_norm"``, the spatial mean of every batch-norm layer's input,
            concatenated over layers (CMI's instance features); or ``None``.
        counted: how many of the images, the first ones, the statistics are of; ``None`` for all. So two views of a batch can share a pass.

    Raises:
        TeacherError: the teacher has no final linear layer to take penultimate features from.
    """
    if isinstance(teacher, Observable):
        return teacher.observe(images, statistics=statistics, features=features, counted=counted)
    return pass_of()(teacher, images, statistics=statistics, features=features, counted=counted)


@runtime_checkable
class Observable(Protocol):
    """A teacher that observes itself because it is made of several modules."""

    def observe(self, images: Tensor, *, statistics: bool, features: Features | None, counted: int | None) -> Observation:
        """As :func:`observe`."""
        ...


def observe_module(module: nn.Module, images: Tensor, *, statistics: bool, features: Features | None, counted: int | None) -> Observation:
    """As :func:`observe`, for one module. A pure function of its tensors, so that it may run under ``vmap`` or be checkpointed."""
    layers = batch_norm_layers(module) if statistics or features == "batch_norm" else []
    taken: dict[nn.Module, Tensor] = {}
    seen: dict[nn.Module, Tensor] = {}

    def at_batch_norm(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0].float()
        if statistics:
            part = x[:counted]
            axes = [0, *range(2, x.dim())]
            mean = part.mean(axes, keepdim=True)
            # Not Tensor.var: on a CPU it takes several times as long, forward and back.
            taken[layer] = torch.stack([mean.flatten(), (part - mean).square().mean(axes)])
        if features == "batch_norm":
            seen[layer] = x.flatten(2).mean(2) if x.dim() > 2 else x

    def at_final_layer(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[layer] = inputs[0].float()

    final = [final_layer(module)] if features == "penultimate" else []  # looked for before the first hook: there may be none
    hooks = [layer.register_forward_pre_hook(at_batch_norm) for layer in layers]
    hooks += [layer.register_forward_pre_hook(at_final_layer) for layer in final]
    try:
        logits = module(images).float()
    finally:
        for hook in hooks:
            hook.remove()
    # In module order, whatever the order of calls. A layer that this pass left out (an auxiliary head) shows what it remembers.
    found = [taken[layer] if layer in taken else running(layer) for layer in layers] if statistics else []
    order = layers if features == "batch_norm" else list(seen)
    parts = [seen[layer] for layer in order if layer in seen]
    return Observation(logits, torch.cat(found, 1) if found else logits.new_zeros(2, 0), torch.cat(parts, 1) if parts else logits[:, :0])


_compiles: ContextVar[bool] = ContextVar("_compiles", default=False)


@contextmanager
def compiled(on: bool = True) -> Iterator[None]:
    """Inside the block the passes of :func:`observe`, and their way back, are code that ``torch.compile`` has made.

    Each architecture is compiled once a process for every size of its batches and every choice of what is looked at: on a CPU some
    ten seconds. ``benchmarks/synthesis_speed.py`` measures what that gives. The last bits differ from those of other passes, and are the
    same each time. Members of an ensemble that are computed in one batched call are not compiled.

    Raises:
        FedimprError: PyTorch would find no C++ compiler, or, inside the block, its compiler fails.
    """
    if on and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise FedimprError("there is no C++ compiler", stage="compiling a network", remedy="Install g++, or set compile=false.")
    token = _compiles.set(on)
    try:
        yield
    finally:
        _compiles.reset(token)


def pass_of() -> Callable[..., Observation]:
    """:func:`observe_module`, or what the compiler made of it."""
    return _fast_pass if _compiles.get() else observe_module


def _fast_pass(*images: Any, **asked: Any) -> Observation:
    try:
        return _compiler()(*images, **asked)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        problem = f"PyTorch's compiler failed: {str(error).strip().splitlines()[0]}"
        raise FedimprError(problem, stage="compiling a network", remedy="Set compile=false.") from error


@functools.cache
def _compiler() -> Callable[..., Observation]:
    # For each size its own code: code for any size would come second, and results depend on which was made.
    return torch.compile(observe_module, dynamic=False)


def batch_norm_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a teacher that keep running statistics, in module order."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def running(layer: nn.Module) -> Tensor:
    """(2, S): the running mean and variance of a batch-norm layer."""
    assert isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    return torch.stack([layer.running_mean, layer.running_var]).detach().float()


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
