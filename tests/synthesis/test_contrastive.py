"""Contrastive model inversion."""

from __future__ import annotations

import logging

import pytest
import torch

from fedimpr.errors import ConfigError
from fedimpr.models import final_layer
from fedimpr.observation import observe
from fedimpr.synthesis import ContrastiveModelInversion
from fedimpr.synthesis.generator import Generator, ProjectionHead
from fedimpr.synthesis.priors import Priors, RunningStatistics, disagreement
from fedimpr.views import Views
from tests.makers import CLASSES, SHAPE, priors, small_ensemble, small_model
from tests.synthesis.faulty import Faulty

UNMOVED = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)


def method(**changes) -> ContrastiveModelInversion:
    still = {"shift": 0.0, "rotation": 0.0, "flip": False}
    settings = {
        "latent": 8, "width": 8, "steps": 5, "lr": 0.01, "batch_size": 8, "priors": loss(), "contrastive_weight": 0.8,
        "contrast_temperature": 0.1, "features": "batch_norm", "hidden": 32, "projection": 16, "memory": 20, "negatives": 12,
        "temperature": 20.0, "global_view": Views(**{**still, "shift": 0.125}, scale=(1.0, 1.0)),
        "local_view": Views(**still, scale=(0.25, 1.0)),
    }  # fmt: skip
    return ContrastiveModelInversion(**{**settings, **changes})


def loss(**changes) -> Priors:
    return priors(**{"target": 1.0, "batch_norm": 1.0, "adversarial": 0.5, "adversarial_form": "masked_kl", **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 9, 13)])
def test_the_generator_draws_any_size_in_range(shape: tuple[int, int, int]) -> None:
    images = Generator(5, 6, shape)(torch.randn(4, 5)).detach()
    assert images.shape == (4, *shape) and float(images.min()) >= 0 and float(images.max()) <= 1


def test_the_published_generator_for_cifar_has_its_published_size() -> None:
    """Latent 256, width 128: 256 * 8192 + 8192 linear; batch norms 2 (128 + 128 + 64); convolutions 9 * 128 * 128 + 128, 9 * 128 * 64 +
    64, 9 * 64 * 3 + 3.
    """
    expected = 256 * 8192 + 8192 + 2 * (128 + 128 + 64) + (9 * 128 * 128 + 128) + (9 * 128 * 64 + 64) + (9 * 64 * 3 + 3)
    assert sum(p.numel() for p in Generator(256, 128, (3, 32, 32)).parameters()) == expected


def test_projections_are_unit_vectors() -> None:
    torch.testing.assert_close(ProjectionHead(6, 4, 3)(torch.randn(5, 6)).norm(dim=1), torch.ones(5))


def test_each_term_brings_down_what_it_weighs() -> None:
    """With the class term alone the teacher recognises the wanted classes; with the batch-norm term alone the statistics come closer."""
    teacher = small_ensemble()

    def mined(steps: int, **weights: float) -> tuple[float, float]:
        one = method(priors=priors(**weights), contrastive_weight=0.0, lr=0.03, batch_size=16, steps=steps, global_view=UNMOVED)
        made = one.synthesize(teacher, 16, generator(), shape=SHAPE)
        seen = observe(teacher, made.images, statistics=True)
        distance = RunningStatistics(teacher).distance(seen.statistics)
        return torch.nn.functional.cross_entropy(seen.logits, made.labels).item(), distance.item()

    assert mined(40, target=1.0)[0] < mined(1, target=1.0)[0] - 0.01
    assert mined(40, batch_norm=1.0)[1] < 0.8 * mined(1, batch_norm=1.0)[1]


def test_the_adversarial_term_looks_for_disagreement_with_the_student() -> None:
    teacher, student = small_model(0), small_model(0)
    for model, voice in ((teacher, 20), (student, 10)):  # the same decisions, held with unlike force
        for value in final_layer(model).parameters():
            value.data *= voice

    def divergence(steps: int) -> float:
        only = priors(adversarial=1.0, adversarial_form="masked_kl")
        one = method(priors=only, contrastive_weight=0.0, steps=steps, lr=0.03, global_view=UNMOVED)
        made = one.synthesize(teacher, 8, generator(), shape=SHAPE, student=student)
        with torch.no_grad():
            return disagreement(teacher(made.images), student(made.images), "kl").item()

    assert divergence(40) > 1.5 * divergence(1)


def test_the_memory_is_bounded_and_oldest_first() -> None:
    cmi = method()
    cmi.synthesize(small_model(), 16, generator(), shape=SHAPE)
    first = cmi.state_dict()["memory"]
    cmi.synthesize(small_model(), 8, generator(1), shape=SHAPE)
    second = cmi.state_dict()["memory"]
    assert len(first) == 16 and len(second) == 20  # 16 + 8 = 24, four of the oldest are gone
    assert torch.equal(second[:12], first[4:])


def test_state_goes_out_and_in() -> None:
    """Mining twice equals mining, moving the state to a new object, and mining there."""
    straight, before, after = method(), method(), method()
    teacher, student = small_ensemble(), small_model(7)
    source = generator()
    straight.synthesize(teacher, 16, source, shape=SHAPE, student=student)
    expected = straight.synthesize(teacher, 16, source, shape=SHAPE, student=student)
    source = generator()
    before.synthesize(teacher, 16, source, shape=SHAPE, student=student)
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.synthesize(teacher, 16, source, shape=SHAPE, student=student).images, expected.images)


def test_what_a_teacher_cannot_support_is_dropped_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cmi = method()
        cmi.synthesize(small_model(batch_norm=False), 8, generator(), shape=SHAPE)
        cmi.synthesize(small_model(batch_norm=False), 8, generator(), shape=SHAPE)
    notes = [record.getMessage() for record in caplog.records]
    assert sorted(notes) == [  # once each, however often it mines
        "the adversarial term (weight 0.5) is dropped: there is no student",
        "the batch_norm term (weight 1) is dropped: the teacher has no batch norm",
        "the contrastive term (weight 0.8) is dropped: the teacher has no batch norm to take features from",
    ]
    caplog.clear()
    one = method(features="penultimate", priors=priors(target=1.0))
    one.synthesize(small_model(batch_norm=False), 8, generator(), shape=SHAPE)
    assert not caplog.records  # the contrast has its features from the final layer


def test_another_size_of_ensemble_starts_head_and_memory_anew() -> None:
    cmi = method()
    cmi.synthesize(small_ensemble(2), 16, generator(), shape=SHAPE)
    made = cmi.synthesize(small_ensemble(3), 8, generator(), shape=SHAPE)
    assert len(made) == 8 and len(cmi.state_dict()["memory"]) == 8


def test_a_batch_that_diverges_leaves_head_and_memory_as_they_were() -> None:
    """Of two batches the second fails in its third step: answers 1 (how many classes), 2 to 8 (features' size, five steps, features), and
    the same again from 9.
    """
    straight, broken = method(), method()
    straight.synthesize(small_model(), 8, generator(), shape=SHAPE)
    assert len(broken.synthesize(Faulty(12, 12), 16, generator(), shape=SHAPE)) == 8
    one, two = straight.state_dict(), broken.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_wanted_classes_are_drawn_from_all() -> None:
    made = method(steps=1, batch_size=64).synthesize(small_model(), 200, generator(), shape=SHAPE)
    assert len(made) == 200 and sorted(made.labels.unique().tolist()) == list(range(CLASSES))


@pytest.mark.parametrize(
    ("change", "key"),
    [({"batch_size": 1}, "batch_size"), ({"lr": 0.0}, "lr"), ({"features": "x"}, "features"),
     ({"contrastive_weight": -1.0}, "contrastive_weight"), ({"priors": loss(activation=0.1)}, "priors.activation")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        method(**change)


def test_an_activation_prior_shares_its_features_with_the_contrast_or_has_none_to_share_with() -> None:
    for settings in ({"features": "penultimate"}, {"contrastive_weight": 0.0}):
        assert len(method(priors=loss(activation=0.1), **settings).synthesize(small_model(), 8, generator(), shape=SHAPE)) == 8
