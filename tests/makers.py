"""Small parts that many tests need."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from fedimpr import seeds
from fedimpr.ensemble import Ensemble
from fedimpr.models import Classifier, build
from fedimpr.synthesis.priors import Priors

needs_a_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")

SHAPE = (1, 8, 8)
CLASSES = 4


def small_model(seed: int = 0, *, batch_norm: bool = True, name: str = "lenet5") -> Classifier:
    """A LeNet-5 for 8x8 grey images and 4 classes, whose batch-norm layers have seen something."""
    options = {"batch_norm": batch_norm} if name.startswith("lenet5") else {}
    model = build(name, shape=SHAPE, classes=CLASSES, mean=[0.5], std=[0.25], seed=seed, **options)
    with torch.no_grad():
        model(torch.rand(32, *SHAPE, generator=seeds.generator(seed, "warm-up")))
    return model.eval()


def small_ensemble(members: int = 3, *, batch_norm: bool = True, batched: bool | None = None) -> Ensemble:
    """An ensemble of LeNets that differ in their seeds."""
    return Ensemble([small_model(seed, batch_norm=batch_norm) for seed in range(members)], batched=batched)


def priors(**given) -> Priors:
    """An inversion loss of the given weights and forms, and of nothing else."""
    terms = ("target", "confidence", "entropy", "balance", "activation", "batch_norm", "total_variation", "norm", "adversarial")
    forms = {"batch_norm_form": "distance", "adversarial_form": "kl"}
    return Priors(**{**dict.fromkeys(terms, 0.0), **forms, **given})


class Linear(nn.Module):
    """A teacher whose every number can be worked out by hand: logits are a linear map of the pixels."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.layer = nn.Linear(len(weight[0]), len(weight), bias=False)
        self.layer.weight.data = torch.tensor(weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))
