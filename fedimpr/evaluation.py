"""Evaluation on real, labelled images: the only place where test labels are looked at."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fedimpr.data import Images
from fedimpr.devices import device_of
from fedimpr.observation import frozen


class Score(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy in nats."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(model: nn.Module, data: Images, batch_size: int | None = None) -> Score:
    """Score a model (or an ensemble) that maps images to logits; it is left as it was found.

    Args:
        model: on any device.
        data: what it is scored on, one image or more.
        batch_size: images in a pass. ``None``: 500 on an accelerator, 100 on a CPU, where fresh memory for large activations takes longer
            than the computation saves.
    """
    device = device_of(model)
    batch_size = batch_size or (100 if device.type == "cpu" else 500)
    totals = torch.zeros(2, device=device, dtype=torch.float64)
    with frozen(model):
        for places in torch.arange(len(data)).split(batch_size):
            images, labels = (part.to(device) for part in data.batch(places))
            logits = model(images)
            totals += torch.stack([(logits.argmax(1) == labels).sum().double(), F.cross_entropy(logits, labels, reduction="sum").double()])
    hits, loss = (totals / len(data)).tolist()
    return Score(hits, loss)
