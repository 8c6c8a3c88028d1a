"""A client's training."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from makers import CLASSES, SHAPE, small_model

from fedimpr import seeds
from fedimpr.data import Images
from fedimpr.training import LocalTraining
from fedimpr.views import Views


def some_images(count: int) -> Images:
    random = seeds.generator(0, "images")
    pixels = torch.randint(256, (count, *SHAPE), generator=random, dtype=torch.uint8)
    return Images(pixels, torch.randint(CLASSES, (count,), generator=random), tuple("abcd"))


def training(**given) -> LocalTraining:
    settings = {"epochs": 2, "batch_size": 8, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "clip": 0.5, "momentum_kept": False}
    return LocalTraining(**{**settings, **given}, views=Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False))


@pytest.mark.parametrize("given", [{}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"clip": None}])
def test_it_is_the_sgd_of_pytorch(given: dict) -> None:
    """The same steps by ``torch.optim.SGD``, over the same batches: 20 images in batches of 8, 8 and 4."""
    data, local = some_images(20), training(**given)
    model = small_model()
    other = copy.deepcopy(model).train()
    metrics = local(model, data, seeds.generator(0, "x"))
    sgd = torch.optim.SGD(other.parameters(), local.lr, local.momentum, weight_decay=local.weight_decay)
    random = seeds.generator(0, "x")
    seeds.draw_seed(random)  # the training draws one for dropout
    for _ in range(local.epochs):
        losses = []
        for places in torch.randperm(20, generator=random).split(8):
            images, labels = data.batch(places)
            loss = F.cross_entropy(other(images), labels)
            sgd.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), local.clip or torch.inf)
            sgd.step()
            losses.append(loss.item() * len(places))
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert metrics["loss"] == pytest.approx(sum(losses) / 20, rel=1e-5)


def test_what_is_frozen_or_unused_stays_as_it_is() -> None:
    model = small_model()
    frozen, model.spare = model.network[0].weight, torch.nn.Parameter(torch.ones(3))
    frozen.requires_grad_(False)
    before, kept = copy.deepcopy(model.state_dict()), dict[str, torch.Tensor]()
    training(momentum_kept=True)(model, some_images(20), seeds.generator(0, "x"), momentum=kept)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {"network.0.weight", "spare"}
    assert kept.keys() == {name for name, _ in model.named_parameters()} - same


@pytest.mark.parametrize(("batch_size", "seen"), [(1, 3), (2, 2), (3, 3)])
def test_a_last_image_alone_is_left_out(batch_size: int, seen: int) -> None:
    """Of three images, unless batches are of one. With a rate of next to nothing the accuracy is that of the model on those it saw."""
    model, data = small_model(batch_norm=False), some_images(3)
    metrics = training(epochs=1, batch_size=batch_size, lr=1e-12)(model, data, seeds.generator(0, "x"))
    random = seeds.generator(0, "x")
    seeds.draw_seed(random)
    images, labels = data.batch(torch.randperm(3, generator=random)[:seen])
    with torch.no_grad():
        losses = F.cross_entropy(model.eval()(images), labels)
    assert metrics["loss"] == pytest.approx(losses.item(), rel=1e-4)


@pytest.mark.slow
def test_a_client_does_not_import_the_compiler_of_pytorch() -> None:
    """It takes a process two seconds, and a pool has many."""
    code = (
        "import sys, test_training as t; from makers import small_model; from fedimpr import seeds;"
        "t.training()(small_model(), t.some_images(20), seeds.generator(0, 'x')); print('torch._dynamo' in sys.modules)"
    )
    environment = {"PYTHONPATH": "tests:."}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split()[-1] == "False"
