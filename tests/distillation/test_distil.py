"""Data-free distillation."""

from __future__ import annotations

import math

import pytest
import torch

from fedimpr.distillation import Distillation, Mining, mine_and_distil, soft_divergence
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Bank, Impressions, Source
from fedimpr.synthesis import silent
from fedimpr.views import Views
from tests.makers import CLASSES, SHAPE, small_model

STILL = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)
SOURCE = Source("a model", "noise", 1, 0)


class Noise:
    """The least synthesizer: uniform noise, and a diary of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.students: list[torch.Tensor] = []

    def synthesize(self, teacher, count, generator, *, shape, student=None, progress=None) -> Impressions:
        self.asked.append(count)
        self.students.append(next(student.parameters()).detach().clone())
        images = torch.rand(count, *shape, generator=generator)
        return Impressions(images, torch.full((count, CLASSES), 1 / CLASSES), torch.zeros(count, dtype=torch.int64), count)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state) -> None:
        pass


def settings(**changes) -> Distillation:
    values = {"steps": 30, "batch_size": 16, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "temperature": 2.0, "views": STILL}
    return Distillation(**{**values, **changes})


def distil(student, method, *, mining, seed=0, progress=silent, **changes) -> int:
    return mine_and_distil(
        small_model(0),
        student,
        method,
        mining=mining,
        distillation=settings(**changes),
        bank=Bank(mining.capacity),
        source=SOURCE,
        shape=SHAPE,
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
    )


def test_soft_divergence_by_hand() -> None:
    """At T = 2 the teacher says (3/4, 1/4) and the student (1/2, 1/2): 4 * (3/4 ln(3/2) + 1/4 ln(1/2))."""
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert soft_divergence(student, teacher, 2.0).item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert soft_divergence(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-7)


def test_at_high_temperature_it_approaches_half_the_variance_of_the_logit_gap() -> None:
    """T^2 KL tends to the mean square of the centred logit differences over 2 K, summed (Hinton et al. 2015, section 2.1)."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, generator=g, dtype=torch.float64), torch.randn(5, 4, generator=g, dtype=torch.float64)
    gap = a - b
    expected = (gap - gap.mean(1, keepdim=True)).square().mean(1).mean() / 2
    assert soft_divergence(a, b, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_portions_share_images_and_steps_and_the_student_learns_between_them() -> None:
    method, ticks, student = Noise(), [], small_model(5)

    def told(stage: str, done: int, total: int, **info: object) -> None:
        ticks.append((stage, done, total))

    passes = distil(student, method, mining=Mining(images=10, portions=3, capacity=10), progress=told, steps=7, batch_size=4)
    assert method.asked == [3, 3, 4]
    assert [done for stage, done, total in ticks if stage == "distilling"] == [1, 2, 3, 4, 5, 6, 7]
    assert passes == 10 + 7 * 4
    assert not torch.equal(method.students[0], method.students[1])
    assert not student.training


def test_the_student_comes_closer_to_the_teacher() -> None:
    teacher, x = small_model(0), torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(9))

    def gap(student: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(soft_divergence(student.eval()(x), teacher(x), 1.0))

    before, student = gap(small_model(5)), small_model(5)
    distil(student, Noise(), mining=Mining(images=64, portions=1, capacity=64), steps=100)
    assert gap(student) < 0.5 * before


def test_same_generator_same_student_even_with_dropout() -> None:
    def student() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), small_linear())

    def small_linear() -> torch.nn.Linear:
        layer = torch.nn.Linear(64, CLASSES)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        return layer

    results = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # the global state differs from run to run
        one = student()
        distil(one, Noise(), mining=Mining(images=16, portions=1, capacity=16), seed=seed, steps=5)
        results.append(one[2].weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_the_last_learning_rate_is_zero_so_the_last_step_is_the_result() -> None:
    """On a cosine of S steps the rate of step s is lr (1 + cos(pi s / S)) / 2, so the last step, s = S - 1, hardly moves the student."""
    moves, last = [], {}

    def told(stage: str, done: int, total: int, **info: object) -> None:
        if stage != "distilling":
            return
        weights = next(student.parameters()).detach().clone()
        if "w" in last:
            moves.append(float((weights - last["w"]).norm()))
        last["w"] = weights

    student = small_model(5)
    distil(student, Noise(), mining=Mining(images=16, portions=1, capacity=16), progress=told, steps=50, momentum=0.1)
    assert moves[-1] < 0.05 * moves[0]


def test_divergence_is_an_error_with_a_remedy() -> None:
    with pytest.raises(FedimprError, match=r"distillation: the student's loss is not finite .*Lower distillation.lr"):
        distil(small_model(5), Noise(), mining=Mining(images=16, portions=1, capacity=16), lr=1e30)


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"temperature": 0.0}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        settings(**change)
    with pytest.raises(ConfigError, match="images"):
        Mining(images=1, portions=2, capacity=1)
