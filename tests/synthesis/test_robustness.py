"""Teachers that are small, odd, damaged or failing: what every method of ``configs/synthesis`` makes of them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.ensemble import Ensemble
from fedimpr.errors import TeacherError
from fedimpr.impressions import Impressions
from fedimpr.synthesis import AdversarialGenerator, Synthesizer
from fedimpr.synthesis.descent import Diverged
from sim.config import Settings, call
from strategies import Method
from tests.makers import small_ensemble, small_model
from tests.sim.tiny import METHODS, SMALL, tiny

COUNT = 10  # more than a batch, and no multiple of it
GREY = (1, 8, 8)

every_method = pytest.mark.parametrize("name", METHODS)


@functools.cache
def settings() -> Settings:
    return tiny(Path("unused"))


def synthesizer(name: str) -> Synthesizer:
    """A fresh one, shrunk."""
    return call(Method, settings().synthesis[name], f"synthesis.{name}").synthesizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def teacher(
    *, channels: int = 1, classes: int = 4, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, stride: int = 1, seed: int = 0
) -> nn.Sequential:
    """A convolutional network that takes images of any size."""
    with seeds.isolated(seed):
        first = [nn.Conv2d(channels, 6, 3, stride=stride, padding=1), norm(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*first, nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, classes)).eval()


def mined(name: str, model: nn.Module, shape: tuple[int, int, int] = GREY, *, student: nn.Module | None = None) -> Impressions:
    """Impressions, which were checked to be finite and in range as they were made."""
    return synthesizer(name).synthesize(model, COUNT, generator(), shape=shape, student=student or model)


def assert_sound(made: Impressions, shape: tuple[int, int, int], classes: int) -> None:
    assert made.images.shape == (COUNT, *shape) and made.images.dtype == torch.float32 and float(made.images.std()) > 0
    assert made.targets.shape == (COUNT, classes) and set(made.labels.tolist()) <= set(range(classes))
    torch.testing.assert_close(made.targets.sum(1), torch.ones(COUNT))


# Of every kind

KINDS = {
    "no batch norm": ({"norm": lambda channels: nn.Identity()}, GREY),
    "group norm": ({"norm": lambda channels: nn.GroupNorm(2, channels)}, GREY),
    "batch norm without memory": ({"norm": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)}, GREY),
    "one channel": ({"channels": 1}, (1, 8, 8)),
    "three channels": ({"channels": 3}, (3, 8, 8)),
    "2 classes": ({"classes": 2}, GREY),
    "200 classes": ({"classes": 200}, GREY),
    "not square": ({"channels": 3}, (3, 9, 13)),
}


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_teachers_of_every_kind_are_mined(name: str, kind: str) -> None:
    options, shape = KINDS[kind]
    made = mined(name, teacher(**options), shape, student=teacher(**options, seed=1))
    assert_sound(made, shape, options.get("classes", 4))


@pytest.mark.parametrize("name", ["deep_inversion", "dfq", pytest.param("cmi", marks=pytest.mark.slow)])
def test_large_images_are_mined(name: str) -> None:
    shape = (3, 224, 224)
    assert_sound(mined(name, teacher(channels=3, stride=8), shape), shape, 4)


# Of every precision


@every_method
def test_weights_that_were_stored_in_half_precision_are_as_good(name: str) -> None:
    assert_sound(mined(name, teacher().half().float()), GREY, 4)


@every_method
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_of_another_precision_is_refused_in_a_line(name: str, precision: torch.dtype) -> None:
    with pytest.raises(TeacherError, match=f"Its weights are {precision}; cast it to float32.") as error:
        mined(name, teacher().to(precision))
    assert "\n" not in str(error.value)


# Damaged


def spoilt(place: int, value: float) -> nn.Module:
    """One weight of a layer is no number."""
    model = teacher()
    model[place].weight.data.view(-1)[0] = value
    return model


@every_method
@pytest.mark.parametrize("model", [spoilt(0, float("nan")), spoilt(1, float("nan")), spoilt(5, float("nan")), spoilt(7, float("nan"))])
def test_a_weight_that_is_no_number_is_refused(name: str, model: nn.Module) -> None:
    with pytest.raises(TeacherError, match="the teacher's logits are not finite"):
        mined(name, model)


@every_method
def test_a_broken_member_of_an_ensemble_is_refused(name: str) -> None:
    with pytest.raises(TeacherError, match="the teacher's logits are not finite"):
        mined(name, Ensemble([teacher(), spoilt(5, float("nan"))]))


@every_method
def test_channels_that_never_varied_in_training_are_no_obstacle(name: str) -> None:
    model = teacher()
    model[1].running_var.zero_()
    assert_sound(mined(name, model, student=teacher(seed=1)), GREY, 4)


@every_method
def test_a_class_that_was_never_learned_is_no_obstacle(name: str) -> None:
    """Its probability is zero in floating point, for teacher and student."""
    models = [teacher(seed=seed) for seed in (0, 1)]
    for model in models:
        model[-1].weight.data[2] = 0
        model[-1].bias.data[2] = -1e4
    made = mined(name, models[0], student=models[1])
    assert_sound(made, GREY, 4)
    assert made.targets[:, 2].max().item() == 0


@every_method
def test_a_teacher_that_always_says_the_same_is_no_obstacle(name: str) -> None:
    """No slope leads anywhere."""
    model = teacher()
    for value in model[-1].parameters():
        value.data.zero_()
    made = mined(name, model, student=teacher(seed=1))
    torch.testing.assert_close(made.targets, torch.full((COUNT, 4), 0.25))


# Of another shape


class Particular(nn.Module):
    """Asserts the size of its images, as vision transformers do."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2:] == (16, 16), "16x16 images only"
        return images.flatten(1)


@every_method
@pytest.mark.parametrize("model", [teacher(channels=3), small_model(), small_ensemble(2), Particular()])
def test_a_teacher_that_cannot_take_the_shape_is_refused_and_the_shape_named(name: str, model: nn.Module) -> None:
    """Wrong channels, wrong size, a wrong ensemble, and an assertion of the model's own."""
    with pytest.raises(TeacherError, match=r"the teacher cannot take images of shape \(2, 12, 8\): .*\. Give the shape") as error:
        mined(name, model, (2, 12, 8))
    assert "\n" not in str(error.value)


# Failing on the way


class Failing(nn.Module):
    """Its n-th answer that has a slope is not a number; no other is touched."""

    def __init__(self, model: nn.Module, n: int) -> None:
        super().__init__()
        self.model, self.n, self.calls = model, n, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += images.requires_grad
        return self.model(images) * (torch.nan if images.requires_grad and self.calls == self.n else 1)


@every_method
def test_a_batch_that_turns_into_nan_is_left_out_and_the_others_are_kept(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Three batches of three steps; the second step of the second fails. A method that has no batches but a generator keeps that."""
    count, step = 3 * SMALL["batch_size"], SMALL["steps"] + 2
    if not descends(name):
        pytest.skip("nothing is optimised")
    whole = synthesizer(name).synthesize(teacher(), count, generator(), shape=GREY, student=teacher(seed=1))
    broken, source, student = synthesizer(name), generator(), teacher(seed=1)
    if isinstance(broken, AdversarialGenerator):
        model = Failing(teacher(), step)
        broken.synthesize(model, count, source, shape=GREY, student=student)
        with pytest.raises(Diverged, match=r"the \w+ term was not finite in step 2\."):
            broken.synthesize(model, count, source, shape=GREY, student=student)
        assert len(broken.synthesize(model, count, source, shape=GREY, student=student)) == count
        return
    with caplog.at_level(logging.WARNING):
        made = broken.synthesize(Failing(teacher(), step), count, source, shape=GREY, student=student)
    (note,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert re.match(r"batch 2 of 3 is left out: synthesis: the \w+ term was not finite in step 2\.", note)
    assert len(made) == len(made.labels) == len(made.targets) == 16
    assert torch.equal(made.images[:8], whole.images[:8])


def descends(name: str) -> bool:
    """Whether a method asks the teacher for gradients at all."""
    asked = Failing(teacher(), 10**9)
    synthesizer(name).synthesize(asked, SMALL["batch_size"], generator(), shape=GREY, student=teacher(seed=1))
    return asked.calls > 0


class Always(nn.Module):
    """No answer that has a slope is a number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * (torch.nan if images.requires_grad else 1)


@every_method
def test_a_teacher_that_always_fails_is_reported(name: str) -> None:
    if not descends(name):
        pytest.skip("nothing is optimised")
    with pytest.raises(Diverged, match=r"the \w+ term was not finite in step 1\."):
        mined(name, Always(teacher()))
