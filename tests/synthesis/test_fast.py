"""FastDFKD: a start that all batches share."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedimpr.errors import ConfigError
from fedimpr.observation import Observation
from fedimpr.synthesis import FastMetaInversion
from fedimpr.synthesis.descent import Diverged, descend
from fedimpr.synthesis.fast import Gathered, toward
from fedimpr.synthesis.state import MovingStatistics, Trained
from tests.makers import SHAPE, priors, small_ensemble, small_model
from tests.synthesis.faulty import Faulty, still

BATCH = 8


def method(**changes) -> FastMetaInversion:
    settings = {
        "priors": priors(target=1.0, batch_norm=1.0), "meta": "fomaml", "latents": "fresh", "latent": 4, "width": 8, "steps": 3, "lr": 0.01,
        "latent_lr": 0.02, "momentum": 0.9, "batch_size": BATCH, "temperature": 20.0, "views": still(),
    }  # fmt: skip
    return FastMetaInversion(**{**settings, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_weight() -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    return layer


def test_the_start_gets_the_sum_of_the_inner_gradients() -> None:
    """The loss w^2 has the slope 2 w. Steps of size 1/4 from w = 1: slopes 2 and 1, so w is 1/2 and then 1/4, and the sum is 3."""
    start = one_weight()
    copied = copy.deepcopy(start)
    optimisers = [torch.optim.SGD(copied.parameters(), lr=0.25), Gathered(start, copied)]
    descend(
        lambda: copied.weight.view(1, 1, 1, 1),
        lambda images: {"square": images.square().sum()},
        optimisers,
        steps=2,
        told=lambda step, loss: None,
        keep="last",
    )
    assert copied.weight.item() == 0.25 and start.weight.item() == 1.0
    assert start.weight.grad is not None and start.weight.grad.item() == 3.0


def test_reptile_leads_toward_where_the_copy_went() -> None:
    """From 1 to 1/4: 67 * 3/4 = 50.25."""
    start, copied = one_weight(), one_weight()
    copied.weight.data.fill_(0.25)
    toward(start, copied)
    assert start.weight.grad is not None and start.weight.grad.item() == 50.25


@pytest.mark.parametrize("latents", ["fresh", "meta"])
@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_later_batches_are_better_after_as_many_steps(meta: str, latents: str) -> None:
    teacher, batches = small_model(), 30
    settings = {"priors": priors(target=1.0), "steps": 2, "lr": 0.002, "latent_lr": 0.002}
    made = method(meta=meta, latents=latents, **settings).synthesize(teacher, batches * BATCH, generator(), shape=SHAPE)
    with torch.no_grad():
        losses = F.cross_entropy(teacher(made.images), made.labels, reduction="none").view(batches, BATCH).mean(1)
    assert losses[-5:].mean() < losses[:5].mean() - 0.01


def test_meta_latents_are_learned_and_fresh_ones_are_not_kept() -> None:
    fast = method(latents="meta")
    fast.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    first = fast.state_dict()["start.module.latents"]
    fast.synthesize(small_model(), BATCH, generator(1), shape=SHAPE)
    assert first.shape == (BATCH, 4) and not torch.equal(first, fast.state_dict()["start.module.latents"])
    fresh = method()
    fresh.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    assert "start.module.latents" not in fresh.state_dict()


def seen(mean: float, variance: float) -> Observation:
    return Observation(torch.zeros(1, 2), torch.tensor([[mean], [variance]]), torch.zeros(1, 0))


def test_statistics_are_mixed_with_the_average_of_earlier_batches() -> None:
    """m = 3/4. After a first batch of (4, 8), (0, 0) counts as 1/4 (0, 0) + 3/4 (4, 8) = (3, 6), which is then the average. So (4, 8)
    counts as 1/4 (4, 8) + 3/4 (3, 6) = (3.25, 6.5).
    """
    moving = MovingStatistics(0.75)
    assert moving.mixed(seen(1, 1)).statistics.flatten().tolist() == [1, 1]
    assert moving.mixed(seen(4, 8)).statistics.flatten().tolist() == [4, 8]  # the batch goes on: there is no earlier one
    moving.advance()
    assert moving.mixed(seen(0, 0)).statistics.flatten().tolist() == [3, 6]
    moving.advance()
    other = MovingStatistics(0.75)
    other.load_state_dict(moving.state_dict())
    assert other.mixed(seen(4, 8)).statistics.flatten().tolist() == [3.25, 6.5]
    wider = Observation(torch.zeros(1, 2), torch.ones(2, 3), torch.zeros(1, 0))
    assert torch.equal(other.mixed(wider).statistics, torch.ones(2, 3))  # another teacher


def test_without_momentum_statistics_stay_as_they_are() -> None:
    moving = MovingStatistics(0.0)
    moving.mixed(seen(4, 8))
    moving.advance()
    assert moving.mixed(seen(0, 0)).statistics.flatten().tolist() == [0, 0] and moving.state_dict() == {}


def test_the_average_is_kept_for_all_members_of_an_ensemble_and_left_out_where_nothing_is_matched() -> None:
    fast = method()
    fast.synthesize(small_ensemble(3), BATCH, generator(), shape=SHAPE)
    channels = 6 + 16  # of LeNet-5's two convolutions
    assert fast.state_dict()["statistics.average"].shape[0] == 2
    assert fast.state_dict()["statistics.average"].shape[1] % (3 * channels) == 0
    plain = method(priors=priors(target=1.0))
    plain.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    assert not [key for key in plain.state_dict() if key.startswith("statistics.")]


def test_a_batch_that_diverges_leaves_the_start_as_it_was() -> None:
    """Of two batches of 3 steps the second fails: answers 5 to 7, after one that counts the classes and 3 of the first batch."""
    straight, broken = method(), method()
    straight.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    made = broken.synthesize(Faulty(5, 7), 2 * BATCH, generator(), shape=SHAPE)
    assert len(made) == BATCH
    one, two = straight.state_dict(), broken.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_network_is_given_back_as_it_was_where_its_block_diverges_or_leaves_what_is_not_finite() -> None:
    held, layer = Trained(), one_weight()
    network, adam = held.resumed(layer, lambda parameters: torch.optim.Adam(parameters, lr=0.5))

    def step() -> None:
        adam.zero_grad()
        network.weight.sum().backward()
        adam.step()

    with held.protected(1):
        step()
    before = held.state_dict()
    assert before["module.weight"].item() == pytest.approx(0.5)  # Adam's first step is one learning rate long
    with pytest.raises(Diverged, match="loss term was not finite in step 1"), held.protected(1):
        step()
        raise Diverged("loss", 1)
    with pytest.raises(Diverged, match="update term was not finite in step 1"), held.protected(1):
        step()
        network.weight.data.fill_(torch.inf)
    after = held.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()


@pytest.mark.parametrize(
    "change",
    [{"meta": "maml"}, {"latents": "old"}, {"momentum": 1.0}, {"batch_size": 1}, {"latent_lr": 0.0}],
    ids=lambda change: next(iter(change)),
)
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        method(**change)
