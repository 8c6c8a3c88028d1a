"""Data-free distillation."""

from __future__ import annotations

import math
import time

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from fedimpr.distillation import (
    Distillation,
    LogitL1,
    LogitMSE,
    Mining,
    Objective,
    SoftDivergence,
    Spent,
    mine_and_distil,
    soft_divergence,
)
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Bank, Impressions, Source
from fedimpr.observation import Observation
from fedimpr.synthesis import silent
from fedimpr.views import Views
from sim.config import CONFIGS, construct
from tests.makers import CLASSES, SHAPE, small_model

STILL = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)
SOURCE = Source("a model", "noise", 1, 0)
OBJECTIVES = sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml"))


class Noise:
    """The least synthesizer: uniform noise, a step an image and three passes, and a diary of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.students: list[torch.Tensor | None] = []

    def synthesize(self, teacher, count, generator, *, shape, student=None, progress=silent) -> Impressions:
        self.asked.append(count)
        self.students.append(None if student is None else next(student.parameters()).detach().clone())
        for step in range(count):
            progress("mining", step + 1, count)
        images = torch.rand(count, *shape, generator=generator)
        return Impressions(images, torch.full((count, CLASSES), 1 / CLASSES), torch.zeros(count, dtype=torch.int64), 3 * count)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state) -> None:
        pass


def settings(**changes) -> Distillation:
    values = {"steps": 30, "batch_size": 16, "candidates": 1, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0}
    return Distillation(**{**values, "views": STILL, "objective": SoftDivergence(temperature=2.0), **changes})


def mining(images: int, *, before: int = 0, portions: int = 1) -> Mining:
    return Mining(images=images, before=before, portions=portions, capacity=images)


def distil(student, method, *, mining, teacher=None, seed=0, progress=silent, **changes) -> Spent:
    return mine_and_distil(
        teacher or small_model(0),
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


def bound(objective: Objective) -> torch.nn.Module:
    return objective.bound(small_model(0), small_model(1), Bank(1), SHAPE, torch.Generator())


def shown(logits: list[list[float]]) -> Observation:
    x = torch.tensor(logits)
    return Observation(x, x.new_zeros(2, 0), x[:, :0])


def test_gaps_of_logits_by_hand() -> None:
    """Gaps of 1, -2, 0 and 3 have a mean absolute value of 6 / 4 and a mean square of 14 / 4."""
    student, teacher, places = shown([[1.0, 0.0], [2.0, 4.0]]), shown([[0.0, 2.0], [2.0, 1.0]]), torch.tensor([0, 0])
    assert bound(LogitL1())(student, teacher, places).item() == pytest.approx(6 / 4)
    assert bound(LogitMSE())(student, teacher, places).item() == pytest.approx(14 / 4)
    soft = bound(SoftDivergence(temperature=3.0))(student, teacher, places)
    assert soft.item() == pytest.approx(soft_divergence(student.logits, teacher.logits, 3.0).item())


def test_portions_share_images_and_steps_and_the_student_learns_between_them() -> None:
    method, ticks, student = Noise(), [], small_model(5)

    def told(stage: str, done: int, total: int, **info: object) -> None:
        ticks.append((stage, done, total))

    spent = distil(student, method, mining=mining(10, portions=3), progress=told, steps=7, batch_size=4)
    assert method.asked == [3, 3, 4]
    assert [done for stage, done, total in ticks if stage == "distilling"] == [1, 2, 3, 4, 5, 6, 7]
    assert spent.mining_passes == 3 * 10 and spent.teacher_passes == 3 * 10 + 7 * 4
    assert not torch.equal(method.students[0], method.students[1])
    assert not student.training


def test_a_student_learns_from_the_candidates_that_it_is_farthest_from_its_teacher_on() -> None:
    """Of twelve images the four of the largest mean square gap. The other eight leave no trace in the student's batch norm."""
    teacher, student, rest = small_model(0), small_model(5), small_model(5).train()
    candidates, learned = list[torch.Tensor](), list[torch.Tensor]()

    def views(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        candidates.append(images)
        return images

    def seen(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if student.training:
            learned.append(inputs[0].clone())

    student.register_forward_pre_hook(seen)
    spent = distil(student, Noise(), mining=mining(40), teacher=teacher, steps=1, batch_size=4, candidates=3, views=views)
    ((images,), (chosen,)) = candidates, learned
    with torch.no_grad():
        gaps = ((small_model(5)(images) - teacher(images)) ** 2).mean(1)
        rest(chosen)
    assert len(images) == 12 and torch.equal(chosen, images[gaps.sort(descending=True).indices[:4]])
    buffers = dict(student.named_buffers())
    assert any("running" in name for name in buffers)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in rest.named_buffers())
    assert spent.teacher_passes - spent.mining_passes == 12


def test_images_before_the_first_step_are_mined_without_a_student() -> None:
    """Of 10 images 4 come first, then portions of 3, with 2 steps after each; the first portion meets a student that has not learned."""
    method, student, stages = Noise(), small_model(5), []
    fresh = next(student.parameters()).detach().clone()
    spent = distil(
        student,
        method,
        mining=mining(10, before=4, portions=2),
        steps=4,
        batch_size=4,
        progress=lambda stage, *_, **__: stages.append(stage),
    )
    assert method.asked == [4, 3, 3]
    assert method.students[0] is None and torch.equal(method.students[1], fresh) and not torch.equal(method.students[2], fresh)
    assert stages == ["mining"] * 7 + ["distilling"] * 2 + ["mining"] * 3 + ["distilling"] * 2
    assert spent.mining_passes == 3 * 10


def test_time_is_that_of_mining_and_of_distillation() -> None:
    class Slow(Noise):
        def synthesize(self, *args, **kwargs) -> Impressions:
            time.sleep(0.05)
            return super().synthesize(*args, **kwargs)

    start = time.perf_counter()
    spent = distil(small_model(5), Slow(), mining=mining(8, before=2, portions=2), steps=2)
    whole = time.perf_counter() - start
    assert spent.mining_seconds >= 3 * 0.05  # it was called before, and for each portion
    assert 0 < spent.distilling_seconds <= whole - spent.mining_seconds


class Still(torch.nn.Module):
    """Answers at once: for tests in which nothing is to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


@settings_of(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 9), st.integers(0, 9))
def test_progress_never_falls_and_ends_at_its_total(portions: int, before: int, more: int) -> None:
    images, ticks = before + portions + more, {"mining": [], "distilling": []}
    distil(
        Still(),
        Noise(),
        teacher=Still(),
        mining=mining(images, before=before, portions=portions),
        steps=3,
        progress=lambda stage, done, total, **info: ticks[stage].append((done, total)),
    )
    assert ticks["mining"] == [(done, images) for done in range(1, images + 1)]
    assert ticks["distilling"] == [(1, 3), (2, 3), (3, 3)]


def test_progress_ends_at_its_total_where_steps_are_of_whole_batches() -> None:
    """Batches of 4 images and 10 steps: 20 steps for 5 images first, then 10 for either portion of 3 or 4."""

    class Batches(Noise):
        def synthesize(self, teacher, count, generator, *, shape, student=None, progress=silent) -> Impressions:
            total = 10 * -(-count // 4)
            for step in range(total):
                progress("mining", step + 1, total)
            return super().synthesize(teacher, count, generator, shape=shape, student=student)

    ticks = []

    def told(stage: str, done: int, total: int, **info: object) -> None:
        if stage == "mining":
            ticks.append((done, total))

    distil(Still(), Batches(), teacher=Still(), mining=mining(12, before=5, portions=2), steps=2, progress=told)
    shares = [done / total for done, total in ticks]
    assert shares == sorted(shares) and len(ticks) == 20 + 10 + 10
    assert shares[19] == pytest.approx(5 / 12, abs=0.02) and shares[29] == pytest.approx(8 / 12, abs=0.02)
    assert ticks[-1][0] == ticks[-1][1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_student_comes_closer_to_the_teacher_by_every_objective(name: str) -> None:
    node = yaml.safe_load((CONFIGS / "objective" / f"{name}.yaml").read_text())
    teacher, x = small_model(0), torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(9))

    def gap(student: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(soft_divergence(student.eval()(x), teacher(x), 1.0))

    before, student = gap(small_model(5)), small_model(5)
    distil(student, Noise(), mining=mining(64), steps=50, batch_size=8, objective=construct(node, "distillation.objective"))
    assert gap(student) < 0.5 * before


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_put_where_the_student_learns(name: str) -> None:
    assert (CONFIGS / "objective" / f"{name}.yaml").read_text().startswith("# @package distillation.objective\n")


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
        distil(one, Noise(), mining=mining(16), seed=seed, steps=5)
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
    distil(student, Noise(), mining=mining(16), progress=told, steps=50, momentum=0.1)
    assert moves[-1] < 0.05 * moves[0]


def test_divergence_is_an_error_with_a_remedy() -> None:
    with pytest.raises(FedimprError, match=r"distillation: the student's loss is not finite .*Lower distillation.lr"):
        distil(small_model(5), Noise(), mining=mining(16), lr=1e30)


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        settings(**change)


def test_objectives_and_minings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        SoftDivergence(temperature=0.0)
    good = {"images": 5, "before": 3, "portions": 2, "capacity": 5}
    Mining(**good)
    for key, value in (("images", 4), ("before", -1), ("portions", 0), ("capacity", 0)):
        with pytest.raises(ConfigError, match=f"'{key}'"):
            Mining(**{**good, key: value})
