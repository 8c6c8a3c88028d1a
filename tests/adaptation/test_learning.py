"""A target client's turn, and what every method owes: found by walking ``configs/adaptation``, so a new one is tested by having a yaml."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedimpr.adaptation import (
    KD3A,
    Given,
    SelfTraining,
    SourceImpressions,
    TargetStatistics,
    TargetTraining,
    reestimate,
    statistics_of,
    unremembered,
)
from fedimpr.adaptation.learning import batches, whole
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.views import Views
from sim.config import composed, construct
from tests.makers import CLASSES, SHAPE, Linear, small_model
from tests.sim.adapting_tiny import WAYS

STILL = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)


# Every yaml but the one that trains nothing.
EVERY = pytest.mark.parametrize("name", [way for way in WAYS if way != "batch_norm"])


@functools.lru_cache
def shipped() -> Mapping[str, Any]:
    """All yamls of configs/adaptation."""
    return composed([f"adaptation=[{','.join(WAYS)}]"]).adaptation


def training(name: str, **other) -> TargetTraining:
    """As its yaml has it, with fewer and larger steps."""
    return construct({**shipped()[name], "steps": 4, "batch_size": 8, "lr": 0.05, **other}, name)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count, *SHAPE), generator=generator(seed), dtype=torch.uint8)


def everything(count: int = 20) -> Given:
    """Two sources, five impressions of each, and labels."""
    targets = torch.rand(10, CLASSES, generator=generator(2)).softmax(1)
    impressions = SourceImpressions(pixels(10, seed=3), targets, torch.arange(10) % 2)
    sources = [small_model(seed).requires_grad_(False) for seed in (3, 4)]
    return Given(weights=torch.tensor([0.5, 0.5]), impressions=impressions, sources=sources, labels=torch.arange(count) % CLASSES)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def turn(name: str, seed: int = 0, count: int = 20, **other) -> dict[str, torch.Tensor]:
    model = small_model(0)
    metrics = training(name, **other)(model, pixels(count), everything(count), generator(seed))
    assert not model.training and abs(metrics["loss"]) < 100
    return weights(model)


# Every method


@EVERY
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    one = turn(name, seed=0)
    assert not same(one, weights(small_model(0)))
    torch.rand(3)  # the global random state does not matter,
    before = torch.get_rng_state()
    assert same(one, turn(name, seed=0)) and not same(one, turn(name, seed=1))
    assert torch.equal(before, torch.get_rng_state())  # and does not move


@EVERY
def test_sources_and_images_are_left_as_they_were(name: str) -> None:
    beside, own, model = everything(), pixels(), small_model(0)
    before, sources = copy.deepcopy(beside), [weights(source) for source in beside.sources]
    training(name)(model, own, beside, generator())
    assert torch.equal(own, pixels()) and all(map(same, sources, map(weights, beside.sources)))
    assert before.impressions is not None and beside.impressions is not None
    assert torch.equal(before.impressions.pixels, beside.impressions.pixels)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@EVERY
def test_it_learns_from_no_more_than_it_says_it_needs(name: str) -> None:
    """What it does not need is taken away, and the weights stay the same."""
    needs, full = training(name).needs, everything()
    least = replace(
        full,
        impressions=full.impressions if "impressions" in needs else None,
        sources=full.sources if "sources" in needs else (),
        labels=full.labels if "labels" in needs else None,
    )
    model = small_model(0)
    training(name)(model, pixels(), least, generator())
    assert same(weights(model), turn(name))
    assert ("labels" in needs) == (name == "oracle")


@EVERY
def test_what_it_needs_must_be_there(name: str) -> None:
    for need in training(name).needs:
        lacking = replace(everything(), **{need: () if need == "sources" else None})
        with pytest.raises(FedimprError, match=f"adaptation: the method needs {need}, and there are none"):
            training(name)(small_model(0), pixels(), lacking, generator())


@EVERY
@pytest.mark.parametrize("count", [2, 10])
def test_a_target_with_a_few_images_is_adapted_as_well(name: str, count: int) -> None:
    assert all(bool(tensor.isfinite().all()) for tensor in turn(name, count=count).values())


@EVERY
def test_a_model_without_batch_norm_is_adapted_as_well(name: str) -> None:
    model, plain = small_model(0, batch_norm=False), everything()
    plain = replace(plain, sources=[small_model(seed, batch_norm=False) for seed in (1, 2)], impressions=plain.impressions)
    training(name)(model, pixels(), plain, generator())
    assert not same(weights(model), weights(small_model(0, batch_norm=False)))


def test_one_image_is_too_few() -> None:
    with pytest.raises(FedimprError, match="a target client needs two images or more .value 1."):
        turn("shot", count=1)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(FedimprError, match="adaptation: the loss is not finite"):
        turn("oracle", lr=1e30, steps=20)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 0), ("batch_size", 1), ("lr", 0.0), ("momentum", 1.0), ("weight_decay", -1.0), ("clip", 0.0)]
)
def test_numbers_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'shot.{key}' is {re.escape(str(value))}"):
        training("shot", **{key: value})


# The loop


@given(st.integers(2, 30), st.integers(2, 12), st.integers(1, 20))
def test_batches_are_of_one_size_and_a_pass_holds_no_image_twice(count: int, batch_size: int, steps: int) -> None:
    drawn = list(batches(count, batch_size, steps, generator()))
    size = min(batch_size, count)
    assert len(drawn) == steps and {len(places) for _, places in drawn} == {size}
    # Of 7 places in batches of 3 a pass takes two.
    assert [begins for begins, _ in drawn] == [step % (count // size) == 0 for step in range(steps)]
    for first in range(0, steps, count // size):
        one_pass = torch.cat([places for _, places in drawn[first : first + count // size]])
        assert len(one_pass.unique()) == len(one_pass) and set(one_pass.tolist()) <= set(range(count))


def test_no_batch_of_one_image_is_cut() -> None:
    assert [len(part) for part in whole(torch.arange(9), 4)] == [4, 5]
    assert [len(part) for part in whole(torch.arange(10), 4)] == [4, 4, 2]


def test_impressions_are_drawn_by_the_weight_of_their_source_and_not_by_their_number() -> None:
    """One impression of the first source, nine of the second, none wanted of the third: the first is half of what is drawn."""
    origins = torch.tensor([0] + [1] * 9 + [2] * 5)
    shown = origins.byte().view(-1, 1, 1, 1).expand(-1, *SHAPE) * 85
    impressions = SourceImpressions(shown.clone(), torch.eye(3)[origins], origins)
    images, targets = impressions.sample(4000, torch.tensor([0.5, 0.5, 0.0]), generator())
    assert images.shape == (4000, *SHAPE) and (images * 3).unique().tolist() == pytest.approx([0.0, 1.0])
    shares = targets.mean(0)
    assert shares[2] == 0 and abs(float(shares[0]) - 0.5) < 0.04  # five standard deviations of sqrt(1 / 4 / 4000)


def test_impressions_leave_no_trace_in_the_running_statistics() -> None:
    model = small_model(0).train()
    before = statistics_of(model)
    with unremembered(model):
        model(torch.rand(8, *SHAPE))
    after = statistics_of(model)
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("num_batches_tracked"))
    model(torch.rand(8, *SHAPE))
    assert not torch.equal(statistics_of(model)["network.1.running_mean"], before["network.1.running_mean"])


# Single methods


def test_shot_leaves_the_final_layer_alone() -> None:
    before, after = weights(small_model(0)), turn("shot")
    final = [name for name in before if name.startswith("network.13.")]
    assert len(final) == 2 and all(torch.equal(before[name], after[name]) for name in final)
    assert not torch.equal(before["network.0.weight"], after["network.0.weight"])


def test_kd3a_learns_the_mean_of_the_supporters_times_their_number() -> None:
    """Both sources answer class 0 with 0.75 and 0.9, above the gate: the target is (0.825, 0.175), its weight 2."""
    sources = [Linear([[float(torch.logit(torch.tensor(p)))], [0.0]]) for p in (0.75, 0.9)]
    white = torch.full((2, 1, 1, 1), 255, dtype=torch.uint8)
    model = Linear([[0.0], [0.0]])  # (0.5, 0.5): the cross-entropy with anything is ln 2
    bound = KD3A(gate=0.2, gate_at_last=0.3, undecided=0.001).bound(
        model, white, Given(weights=torch.ones(2) / 2, sources=sources), generator()
    )
    assert bound.loss(white.float() / 255, torch.tensor([0, 1]), 0.0).item() == pytest.approx(2 * 0.6931472)
    bound.loss(white.float() / 255, torch.tensor([0, 1]), 0.0).backward()
    # The slope of 2 CE by a logit is 2 (softmax - target) = 2 (0.5 - 0.825).
    assert model.layer.weight.grad is not None and model.layer.weight.grad[0, 0].item() == pytest.approx(-0.65, abs=1e-5)


def test_self_training_learns_from_confident_answers_only() -> None:
    """With everything else off, and an answer of 0.75: at a gate of 0.7 the loss is -ln 0.75, at 0.8 nothing."""
    model = Linear([[float(torch.logit(torch.tensor(0.75)))], [0.0]])
    white, beside = torch.ones(2, 1, 1, 1), Given(weights=torch.ones(1), impressions=SourceImpressions(
        torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([[0.5, 0.5]]), torch.zeros(1, dtype=torch.int64)
    ))  # fmt: skip
    for gate, expected in ((0.7, 0.2876821), (0.8, 0.0)):
        method = SelfTraining(replay=0.0, consistency=1.0, gate=gate, information=0.0, strong=STILL, replayed=STILL)
        loss = method.bound(model, white.byte(), beside, generator()).loss(white, torch.tensor([0, 1]), 0.0)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_target_statistics_change_nothing_else_and_need_batch_norm() -> None:
    model, expected, own = small_model(0), small_model(0), pixels()
    statistics = TargetStatistics(batch_size=64, momentum=None)
    statistics(model, own, Given(weights=torch.zeros(0)), generator())
    reestimate(expected, [own.float() / 255], momentum=None)  # one batch: its order is nothing but rounding
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    with pytest.raises(ConfigError, match="one with batch norm"):
        statistics.check(small_model(0, batch_norm=False))
