"""Batch-norm statistics of the target in place of the source's.

Li, Wang, Shi, Liu, Hou: *Revisiting Batch Normalization for Practical Domain Adaptation*, ICLR Workshops 2017 (arXiv 1603.04779).

No label is needed and no weight changes. Difference: the statistics are means over batches, in a single pass, so a variance does not hold
what lies between the batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedimpr.devices import device_of
from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, FedimprError, TeacherError
from fedimpr.observation import frozen

STAGE = "batch-norm re-estimation"


def reestimate(model: nn.Module, batches: Iterable[Tensor], *, momentum: float | None) -> dict[str, Tensor]:
    """Let a model's batch-norm layers see target images and remember what these are like; nothing else of the model changes.

    Each layer normalises by the batch while the images pass, so that deeper layers see what they will see afterwards, and dropout is off. A
    layer that no image reaches keeps what it has. After an error the model is as it was.

    Args:
        model: one model; the members of an ensemble are given one by one.
        batches: images (N, C, H, W) in [0, 1]; the more in a batch, the better.
        momentum: the share of the newest batch in the running statistics, in (0, 1], which start from the source's. ``None`` forgets these:
            all images count alike.

    Returns:
        The statistics before, for :func:`restore`.

    Raises:
        ConfigError: the momentum is out of range.
        TeacherError: the model is an ensemble, keeps no statistics, cannot take the images, or ends with statistics that are not finite.
        FedimprError: there are no images.
    """
    if momentum is not None and not 0 < momentum <= 1:
        raise ConfigError("momentum", momentum, "a number in (0, 1], or null")
    if isinstance(model, Ensemble):
        raise TeacherError("an ensemble shares no statistics", stage=STAGE, remedy="Re-estimate each member, then make the ensemble.")
    before = statistics_of(model)
    if not before:
        remedy = "Use a network with batch norm, or leave this step out."
        raise TeacherError("the model has no batch-norm layer with running statistics", stage=STAGE, remedy=remedy)
    layers = list(_layers(model).values())
    momenta = [layer.momentum for layer in layers]
    try:
        with torch.no_grad(), frozen(model):
            for layer in layers:
                layer.training = True
                if momentum is None:
                    layer.reset_running_stats()
            _pass(model, layers, batches, momentum)
        unseen = {name for name, layer in _layers(model).items() if momentum is None and not layer.num_batches_tracked}
        after = statistics_of(model)
        restore(model, {key: before[key] if key.rpartition(".")[0] in unseen else value for key, value in after.items()})
        wrong = [key for key, value in after.items() if not bool(value.isfinite().all())]
        if wrong:
            raise TeacherError(f"the statistics are not finite: {wrong[0]}", stage=STAGE, remedy="Check the images and the weights.")
    except BaseException:
        restore(model, before)
        raise
    finally:
        for layer, kept in zip(layers, momenta, strict=True):
            layer.momentum = kept
    return before


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that the batch-norm layers of a model keep of the images that they saw, by its name in the state dict."""
    return {key: buffer.detach().clone() for key, buffer in _buffers(model).items()}


def restore(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Give a model the statistics that :func:`statistics_of` or :func:`reestimate` returned.

    Raises:
        FedimprError: they are of another network; the model keeps its own.
    """
    held = _buffers(model)
    if {key: value.shape for key, value in held.items()} != {key: value.shape for key, value in statistics.items()}:
        raise FedimprError("the statistics are of another network", stage="restoring batch-norm statistics", value=sorted(statistics)[:3])
    with torch.no_grad():
        for key, buffer in held.items():
            buffer.copy_(statistics[key])


def _pass(model: nn.Module, layers: list[_BatchNorm], batches: Iterable[Tensor], momentum: float | None) -> None:
    seen = 0
    for images in batches:
        seen += len(images)
        for layer in layers:
            # PyTorch's own cumulative mean counts batches; a last, small one would weigh as much as the others.
            layer.momentum = len(images) / seen if momentum is None else momentum
        try:
            model(images.to(device_of(model)))
        except Exception as error:  # whatever a module may raise
            reason = " ".join(str(error).split())
            remedy = "Use batches of two images or more." if len(images) == 1 else "Give images of the shape it was trained on."
            raise TeacherError(f"the model cannot take a batch {tuple(images.shape)}: {reason}", stage=STAGE, remedy=remedy) from error
    if not seen:
        raise FedimprError("there are no images", stage=STAGE, value=seen, remedy="Give at least one batch.")


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": buffer for name, layer in _layers(model).items() for key, buffer in layer.named_buffers(recurse=False)}


@contextmanager
def unremembered(model: nn.Module) -> Iterator[None]:
    """A block in which batch-norm layers in training mode normalise by the batch and remember nothing of it but that there was one."""
    layers = list(_layers(model).values())
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
