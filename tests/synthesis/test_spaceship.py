"""SpaceshipNet's channel exchange."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import ConfigError
from fedimpr.synthesis import ChannelExchange
from fedimpr.synthesis.generator import Generator
from fedimpr.synthesis.spaceship import exchange
from tests.makers import CLASSES, SHAPE, priors, small_model
from tests.synthesis.faulty import Faulty, still

BATCH = 8


def method(**changes) -> ChannelExchange:
    settings = {
        "priors": priors(target=0.5, batch_norm=1.0), "latent": 4, "width": 8, "steps": 3, "lr": 0.01, "batch_size": BATCH,
        "exchanged": 0.7, "temperature": 20.0, "views": still(),
    }  # fmt: skip
    return ChannelExchange(**{**settings, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_half_of_the_channels_are_the_partners(n: int, channels: int, seed: int) -> None:
    """Each image's features are its own number: so a channel tells whose it is."""
    features = torch.arange(n).float().view(n, 1, 1, 1).expand(n, channels, 2, 3)
    mixed = exchange(features, generator(seed))
    for i in range(n):
        owners = mixed[i, :, 0, 0].tolist()
        assert mixed[i].std((1, 2)).sum() == 0  # whole channels are exchanged
        if i != n - 1 - i:
            assert owners.count(n - 1 - i) == channels // 2 and owners.count(i) == channels - channels // 2


def test_images_choose_their_channels_apart() -> None:
    mixed = exchange(torch.arange(16).float().view(16, 1, 1, 1).expand(16, 10, 1, 1), generator())
    own = mixed[:, :, 0, 0] == torch.arange(16).view(16, 1)
    assert len({tuple(row.tolist()) for row in own}) > 8


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_features_of_any_stage_can_be_finished(stage: int) -> None:
    network = Generator(4, 8, SHAPE).eval()
    latents = torch.randn(5, 4, generator=generator())
    with torch.no_grad():
        found = network.features(latents)
        assert len(found) == 3 and torch.equal(network.finish(found[stage - 1], stage), network(latents))


def test_the_asked_share_of_every_batch_is_exchanged_and_its_labels_are_the_teachers() -> None:
    """Nothing else depends on the share: so the other images are those that are mined without exchange. round(0.7 * 8) = 6."""
    teacher = small_model()
    none, some = (method(exchanged=share).synthesize(teacher, 3 * BATCH, generator(), shape=SHAPE) for share in (0.0, 0.7))
    other = (none.images != some.images).flatten(1).any(1)
    assert other.view(3, BATCH).sum(1).tolist() == [6, 6, 6]
    assert torch.equal(none.labels[~other], some.labels[~other])
    assert torch.equal(some.labels[other], some.targets[other].argmax(1))
    assert torch.bincount(none.labels, minlength=CLASSES).tolist() == [6, 6, 6, 6]  # 24 images, 4 classes


def test_the_generator_goes_on_from_batch_to_batch() -> None:
    """The first loss of a batch falls: what earlier batches taught of the teacher's statistics is still there."""
    first: list[float] = []

    def progress(stage: str, done: int, total: int, **info: object) -> None:
        if done % 3 == 1:
            first.append(float(info["loss"]))  # type: ignore[arg-type]

    method(priors=priors(batch_norm=1.0)).synthesize(small_model(), 15 * BATCH, generator(), shape=SHAPE, progress=progress)
    assert len(first) == 15 and sum(first[-5:]) < 0.9 * sum(first[:5])


def test_the_features_that_are_exchanged_are_those_of_the_step_with_the_least_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    made, exchanged, losses, original = [], [], [], Generator.features
    monkeypatch.setattr(Generator, "features", lambda self, latents: made.append(original(self, latents)) or made[-1])
    monkeypatch.setattr("fedimpr.synthesis.spaceship.exchange", lambda features, random: exchanged.append(features) or features)
    ship = method(steps=6, lr=1.0)  # far too large, so that the last step is not the best
    ship.synthesize(
        small_model(), BATCH, generator(), shape=SHAPE, progress=lambda stage, done, total, **info: losses.append(float(info["loss"]))
    )
    best = losses.index(min(losses))
    assert best < 5
    assert any(torch.equal(stage, exchanged[0]) for stage in made[best])


def test_the_generator_is_kept_and_its_optimiser_is_not() -> None:
    ship = method()
    assert ship.state_dict() == {}
    ship.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    assert ship.state_dict() and all(key.startswith("module.") for key in ship.state_dict())


def test_a_batch_that_diverges_leaves_the_generator_as_it_was() -> None:
    """Of two batches of 3 steps the second fails: answers 5 to 7, after one that counts the classes and 3 of the first batch."""
    straight, broken = method(), method()
    straight.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    made = broken.synthesize(Faulty(5, 7), 2 * BATCH, generator(), shape=SHAPE)
    assert len(made) == BATCH
    one, two = straight.state_dict(), broken.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "change", [{"exchanged": 1.1}, {"exchanged": -0.1}, {"batch_size": 1}, {"lr": 0.0}], ids=lambda change: str(next(iter(change.items())))
)
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        method(**change)
