"""One generator, four objectives: DAFL, ZSKT, DFQ and DFAD."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml

from fedimpr import seeds
from fedimpr.errors import ConfigError
from fedimpr.models import final_layer
from fedimpr.synthesis import AdversarialGenerator
from fedimpr.synthesis.descent import Diverged
from fedimpr.synthesis.generator import Generator
from fedimpr.synthesis.priors import Priors
from tests.makers import SHAPE, priors, small_model
from tests.synthesis.faulty import Faulty

CONFIGS = Path(__file__).resolve().parents[2] / "configs/synthesis"
NAMES = ("dafl", "zskt", "dfq", "dfad")


def objective(name: str) -> Priors:
    """As the method's yaml has it."""
    node = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())[name]["synthesizer"]["priors"]
    return Priors(**{key: value for key, value in node.items() if key != "_target_"})


def method(**changes) -> AdversarialGenerator:
    settings = {"priors": objective("dafl"), "latent": 4, "width": 8, "steps": 2, "lr": 0.01, "batch_size": 16, "temperature": 1.0}
    return AdversarialGenerator(**{**settings, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loud(seed: int, voice: float) -> torch.nn.Module:
    """A small model whose decisions are held with some force."""
    model = small_model(seed)
    for value in final_layer(model).parameters():
        value.data *= voice
    return model


def weights(one: AdversarialGenerator) -> dict[str, torch.Tensor]:
    """The generator's, running statistics left out."""
    return {name: one.state_dict()[f"module.{name}"] for name, _ in Generator(4, 8, SHAPE).named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_each_objective_comes_down(name: str) -> None:
    """Judged on the images that are drawn after one step and after many. DAFL's is mostly balance, -5 ln 4 = -6.9 at least."""
    teacher, student, loss = loud(0, 10), loud(1, 10), objective(name)
    values = []
    for steps in (1, 40):
        made = method(priors=loss, steps=steps).synthesize(teacher, 64, generator(), shape=SHAPE, student=student)
        values.append(sum(loss.bound(teacher, student)(made.images, None).values()).item())
    assert values[1] < values[0] - 0.05 * abs(values[0])


def test_the_label_is_the_teachers_decision_and_the_passes_are_counted() -> None:
    """Two steps of 16 images, and 20 that are labelled."""
    teacher = loud(0, 10)
    made = method().synthesize(teacher, 20, generator(), shape=SHAPE)
    assert torch.equal(made.labels, made.targets.argmax(1)) and made.teacher_passes == 2 * 16 + 20
    with torch.no_grad():
        torch.testing.assert_close(made.targets, teacher(made.images).softmax(1))


def test_the_generator_goes_on_over_calls() -> None:
    """A small step away from where the first call left it; a fresh one of another seed would be as far as its weights are large, 0.02.

    Adam's step is a few learning rates at most.
    """
    one = method(lr=1e-4, steps=1)
    one.synthesize(small_model(), 4, generator(0), shape=SHAPE)
    first = weights(one)
    one.synthesize(small_model(), 4, generator(1), shape=SHAPE)
    second = weights(one)
    gaps = [float((first[key] - second[key]).abs().max()) for key in first]
    assert 0 < max(gaps) < 1e-3
    other = method(lr=1e-4, steps=1)
    other.synthesize(small_model(), 4, generator(1), shape=SHAPE)
    assert max(float((first[key] - value).abs().max()) for key, value in weights(other).items()) > 0.02


def test_another_image_size_starts_a_generator_anew() -> None:
    one = method(priors=priors(total_variation=1.0))
    one.synthesize(small_model(), 4, generator(), shape=SHAPE)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 3))
    assert one.synthesize(model, 4, generator(), shape=(3, 20, 24)).images.shape == (4, 3, 20, 24)


@pytest.mark.parametrize("name", ["zskt", "dfad"])
def test_without_a_student_an_adversarial_objective_draws_from_the_untrained_generator(name: str, caplog: pytest.LogCaptureFixture) -> None:
    one, source, ticks = method(priors=objective(name)), generator(), []
    with caplog.at_level(logging.WARNING):
        made = one.synthesize(
            small_model(), 16, generator(), shape=SHAPE, progress=lambda stage, done, total, **info: ticks.append((done, total))
        )
    assert [record.getMessage() for record in caplog.records] == ["the adversarial term (weight 1) is dropped: there is no student"]
    with seeds.isolated(seeds.draw_seed(source)):
        untrained = Generator(4, 8, SHAPE)
    with torch.no_grad():
        expected = untrained(torch.randn(16, 4, generator=source))
    torch.testing.assert_close(made.images, expected)  # not bit for bit: its weights lie in memory in another order
    assert ticks == [(1, 1)]
    assert made.teacher_passes == 16  # the labelling


def test_a_step_that_is_not_finite_is_named_and_the_generator_is_what_it_was() -> None:
    """Answers: 1 for the classes, 2 and 3 for the steps, 4 for the labels; in the next call 5, and 6 for its first step."""
    one, straight, teacher = method(), method(), Faulty(6, 6)
    one.synthesize(teacher, 4, source := generator(), shape=SHAPE)
    straight.synthesize(small_model(), 4, generator(), shape=SHAPE)
    with pytest.raises(Diverged, match="confidence term was not finite in step 1"):
        one.synthesize(teacher, 4, source, shape=SHAPE)
    assert all(torch.equal(value, straight.state_dict()[key]) for key, value in one.state_dict().items())
    assert len(one.synthesize(teacher, 4, source, shape=SHAPE)) == 4


def test_a_target_cannot_be_weighed() -> None:
    with pytest.raises(ConfigError, match="priors.target"):
        method(priors=priors(target=0.1))


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 1), ("latent", 0), ("width", 0), ("steps", 0), ("lr", 0.0), ("temperature", 0.0)]
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        method(**{key: value})
