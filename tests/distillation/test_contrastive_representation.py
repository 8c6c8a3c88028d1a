"""Contrastive representation distillation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedimpr import seeds
from fedimpr.distillation import ContrastiveRepresentation, SoftDivergence, soft_divergence
from fedimpr.distillation.contrastive import noise_contrast, remembered
from fedimpr.errors import ConfigError, TeacherError
from fedimpr.impressions import Bank, Impressions, Source
from fedimpr.observation import Observation, frozen, observe
from tests.makers import SHAPE as LENET_SHAPE
from tests.makers import small_ensemble, small_model

SHAPE = (1, 2, 4)


def objective(**changes) -> ContrastiveRepresentation:
    values = {"temperature": 4.0, "weight": 0.8, "projection": 8, "negatives": 64, "contrast_temperature": 0.07, "momentum": 0.5}
    return ContrastiveRepresentation(**{**values, "normalised": True, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bank_of(images: int, capacity: int, shape: tuple[int, int, int] = SHAPE) -> Bank:
    bank = Bank(capacity)
    made = Impressions(torch.rand(images, *shape, generator=generator(1)), torch.full((images, 2), 0.5), torch.zeros(images).long(), 0)
    bank.add(made, Source("a model", "noise", 1, 0))
    return bank


def two_layers(seed: int, features: int = 3) -> nn.Module:
    with seeds.isolated(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(8, features), nn.Linear(features, 2)).eval()


def by_hand(bank: Bank, random: torch.Generator, **changes) -> nn.Module:
    """A loss in double precision whose embeddings leave features of two numbers as they are, but for their length."""
    values = {"projection": 2, "contrast_temperature": 0.5, "weight": 1.0}
    loss = objective(**{**values, **changes}).bound(two_layers(0, 2), two_layers(1, 2), bank, SHAPE, random).double()
    for embedding in (loss.embed_teacher, loss.embed_student):
        embedding.weight.data, embedding.bias.data = torch.eye(2).double(), torch.zeros(2).double()
    return loss


def seen(features: list[list[float]]) -> Observation:
    """Features with logits that do not tell teacher and student apart, so that the soft loss is zero."""
    x = torch.tensor(features, dtype=torch.float64)
    return Observation(torch.zeros(len(x), 2, dtype=torch.float64), x.new_zeros(2, 0), x)


def test_the_contrast_by_hand() -> None:
    """Exponentials 3 (the positive's), 1/4 and 4 against 1 are critics 3/4, 1/5 and 4/5; against 3 they are 1/2, 1/13 and 4/7."""
    scores = torch.tensor([[3.0, 0.25, 4.0]]).log()
    assert noise_contrast(scores, torch.tensor(0.0)).item() == pytest.approx(-math.log(3 / 4 * 4 / 5 * 1 / 5))
    assert noise_contrast(scores, torch.tensor(math.log(3.0))).item() == pytest.approx(-math.log(1 / 2 * 12 / 13 * 3 / 7))
    both = torch.cat([scores, torch.zeros(1, 3)])  # three critics of 1/2 beside it: the mean of the two
    assert noise_contrast(both, torch.tensor(0.0)).item() == pytest.approx((-math.log(3 / 4 * 4 / 5 * 1 / 5) + 3 * math.log(2)) / 2)


def test_extreme_scores_stay_finite() -> None:
    scores = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    loss = noise_contrast(scores, torch.tensor(0.0))
    loss.backward()
    assert loss.item() == 1000.0 and scores.grad.tolist() == [[-1.0, 1.0]]


def test_a_place_keeps_its_share_and_goes_back_to_unit_length() -> None:
    """Half of (1, 0) and half of (0, 1) is (1, 1) / 2. A quarter of (0, 1) and three quarters of (1, 0) is (3, 1) / 4."""
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    after = remembered(memory, torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    torch.testing.assert_close(after, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0], [0.6, 0.8]]))
    after = remembered(memory, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), 0.25)
    torch.testing.assert_close(after[1], torch.tensor([3.0, 1.0]) / 10**0.5)
    assert memory.tolist()[0] == [1.0, 0.0]  # what a gradient may still need is left alone


def test_an_image_that_is_there_twice_is_remembered_by_its_mean() -> None:
    """The mean of (1, 0) and (0, 1) is (1, 1) / 2; with half of (1, 0) that is (3, 1) / 4, whatever the order."""
    memory, units = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    expected = torch.stack([torch.tensor([3.0, 1.0]) / 10**0.5, F.normalize(torch.tensor([0.8, 0.4]), dim=0)])
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        torch.testing.assert_close(remembered(memory, units[order], torch.tensor([0, 0, 1])[order], 0.5), expected)


@pytest.mark.parametrize("normalised", [False, True])
def test_two_images_by_hand(normalised: bool) -> None:
    """Both directions, tau 1/2, three negatives of two places each: N / M = 3/2, or three times the mean exponential of the first batch."""
    random = generator()
    loss = by_hand(bank_of(2, 2), random, negatives=3, normalised=normalised)
    teacher, student = [[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [0.8, 0.6]]  # unit vectors
    memories = [[[0.0, -1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, 1.0]]]  # of the teacher's and of the student's, by place
    loss.of_teacher, loss.of_student = (torch.tensor(memory, dtype=torch.float64) for memory in memories)
    places = [1, 0]
    twin = torch.Generator()
    twin.set_state(random.get_state())
    negatives = torch.randint(2, (2, 3), generator=twin).tolist()

    expected = 0.0
    for units, memory in ((student, memories[0]), (teacher, memories[1])):
        partners = [[places[i], *negatives[i]] for i in range(2)]
        e = [[math.exp(2 * sum(a * b for a, b in zip(units[i], memory[p], strict=True))) for p in partners[i]] for i in range(2)]
        rival = 3 * sum(map(sum, e)) / 8 if normalised else 3 / 2
        for first, *others in e:
            expected -= (math.log(first / (first + rival)) + sum(math.log(rival / (x + rival)) for x in others)) / 2
    assert loss(seen(student), seen(teacher), torch.tensor(places)).item() == pytest.approx(expected, rel=1e-12)


def test_the_constants_are_those_of_the_first_batch() -> None:
    """One image alone is its own negative. First its cosines are 1 and 1, both means e^2; then -1 and -1, so exponentials e^-2."""
    loss = by_hand(bank_of(1, 1), generator(), negatives=1, momentum=0.0)
    loss.of_teacher = loss.of_student = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    place = torch.tensor([0])
    first = loss(seen([[1.0, 0.0]]), seen([[1.0, 0.0]]), place)
    assert first.item() == pytest.approx(2 * 2 * math.log(2))  # two directions, two critics of 1/2
    h = math.exp(-2) / (math.exp(-2) + math.exp(2))
    second = loss(seen([[-1.0, 0.0]]), seen([[-1.0, 0.0]]), place)
    assert second.item() == pytest.approx(2 * (-math.log(h) - math.log(1 - h)))


def test_the_soft_loss_is_added_and_the_weight_is_of_the_contrast() -> None:
    logits, teacher = torch.tensor([[1.0, 2.0]]).double(), seen([[1.0, 0.0]])
    student = seen([[0.6, 0.8]])._replace(logits=logits)
    totals = [by_hand(bank_of(1, 1), generator(), weight=w)(student, teacher, torch.tensor([0])).item() for w in (0.0, 1.0, 2.0)]
    assert totals[0] == pytest.approx(soft_divergence(logits, teacher.logits, 4.0).item())
    assert totals[2] - totals[0] == pytest.approx(2 * (totals[1] - totals[0])) and totals[1] > totals[0]


def test_both_memories_follow_what_was_seen_without_a_gradient() -> None:
    """With momentum 0 a place holds the unit vector of its last image: (3, 4) / 5 and (4, 3) / 5."""
    loss = by_hand(bank_of(3, 3), generator(), momentum=0.0)
    before = loss.of_teacher.clone(), loss.of_student.clone()
    loss(seen([[4.0, 3.0]]), seen([[3.0, 4.0]]), torch.tensor([2])).backward()
    for memory, old, new in ((loss.of_teacher, before[0], [0.6, 0.8]), (loss.of_student, before[1], [0.8, 0.6])):
        assert not memory.requires_grad and torch.equal(memory[:2], old[:2])
        assert memory[2].tolist() == pytest.approx(new)


def test_memories_begin_as_unit_vectors_of_any_direction() -> None:
    loss = objective().bound(two_layers(0), two_layers(1), Bank(500), SHAPE, generator())
    for memory in (loss.of_teacher, loss.of_student):
        assert memory.shape == (500, 8) and not memory.requires_grad
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(500))
        assert memory.mean(0).norm() < 0.15  # of 500 independent unit vectors: about 1 / sqrt(500) = 0.045
    assert not torch.equal(loss.of_teacher, loss.of_student)


@pytest.mark.parametrize("normalised", [False, True])
def test_negatives_come_only_from_places_that_hold_images(normalised: bool) -> None:
    loss = by_hand(bank_of(2, 50), generator(), negatives=500, normalised=normalised)
    loss.of_teacher[2:] = loss.of_student[2:] = torch.nan
    student = seen([[1.0, 0.0], [0.6, 0.8]])
    student.features.requires_grad_()
    value = loss(student, seen([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1]))
    value.backward()
    assert value.isfinite() and student.features.grad.isfinite().all()


def test_a_bank_that_grows_is_drawn_from_as_it_stands() -> None:
    """With one image every negative is that image, which the teacher's and the student's memory know as (1, 0): N / M = 1, then 1/2."""
    bank = bank_of(1, 2)
    loss = by_hand(bank, generator(), negatives=1, normalised=False, momentum=0.0)
    loss.of_teacher, loss.of_student = (torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64) for _ in range(2))
    for held in (1, 2):
        assert len(bank) == held
        h = math.exp(2) / (math.exp(2) + 1 / held)
        value = loss(seen([[1.0, 0.0]]), seen([[1.0, 0.0]]), torch.tensor([0]))
        assert value.item() == pytest.approx(2 * (-math.log(h) - math.log(1 - h)))
        bank.add(Impressions(torch.zeros(1, *SHAPE), torch.full((1, 2), 0.5), torch.zeros(1).long(), 0), Source("a model", "noise", 1, 0))


def test_gradients_are_those_of_finite_differences() -> None:
    """Of the student's features and of both embeddings; the memories, and the constants, are given."""
    random = generator()
    loss = by_hand(bank_of(3, 3), random, negatives=4)
    teacher, places = seen([[1.0, 2.0], [0.5, -1.0], [-1.0, 0.3]]), torch.tensor([0, 2, 2])
    loss(teacher, teacher, places)  # from now on the constants stand
    state, memories = random.get_state(), (loss.of_teacher, loss.of_student)

    def value(features: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        random.set_state(state)
        loss.of_teacher, loss.of_student = memories
        return loss(teacher._replace(features=features), teacher, places)

    features = torch.tensor([[0.2, 1.0], [1.5, 0.4], [-0.7, -0.6]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (features, *loss.parameters()))


def test_no_gradient_flows_through_the_constants() -> None:
    """So the gradient is the same where the constants were known before the first batch."""
    known, grads = None, []
    for _ in range(2):
        loss = by_hand(bank_of(3, 3), generator(), negatives=2)
        if known is not None:
            loss.log_means = known
        student = seen([[0.6, 0.8], [1.0, -0.5]])
        student.features.requires_grad_()
        loss(student, seen([[1.0, 0.2], [-0.3, 0.1]]), torch.tensor([0, 1])).backward()
        known = loss.log_means
        grads.append(student.features.grad)
    assert not known.requires_grad and grads[0].norm() > 0.01
    torch.testing.assert_close(grads[0], grads[1])


def teacher_with_three_features() -> nn.Module:
    """Its features are the first three pixels, four times as large and centred; its logits tell of the first one alone."""
    model = two_layers(0)
    with torch.no_grad():
        model[1].weight.copy_(4 * torch.eye(3, 8))
        model[1].bias.fill_(-2.0)
        model[2].weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
        model[2].bias.zero_()
    return model


def share_of_the_teachers_features(student: nn.Module) -> float:
    """How much of the variance of the teacher's features can be read off the student's by a linear map, on new images."""
    x = torch.rand(300, *SHAPE, generator=generator(99))
    with torch.no_grad():
        wanted, given = (observe(m, x, features="penultimate").features for m in (teacher_with_three_features(), student))
    wanted, given = wanted - wanted.mean(0), given - given.mean(0)
    left = wanted - given @ torch.linalg.lstsq(given, wanted).solution
    return 1 - float(left.square().sum() / wanted.square().sum())


def test_the_student_comes_to_tell_what_the_teachers_logits_do_not() -> None:
    """Logits tell of one pixel, features of three: the soft loss alone cannot make a student of three features see the other two."""

    def taught(how) -> float:
        teacher, student, bank, random = teacher_with_three_features(), two_layers(6), bank_of(128, 128), generator()
        with frozen(teacher):
            loss = how.bound(teacher, student, bank, SHAPE, random)
        sgd = torch.optim.SGD([*student.parameters(), *loss.parameters()], 0.03, 0.9)
        for _ in range(120):
            images, places = bank.sample(32, random)
            with torch.no_grad():
                wanted = observe(teacher, images, features=loss.features)
            sgd.zero_grad()
            loss(observe(student, images, features=loss.features), wanted, places).backward()
            sgd.step()
        return share_of_the_teachers_features(student)

    assert taught(SoftDivergence(temperature=4.0)) < 0.7
    assert taught(objective()) > 0.95


def test_same_seed_same_loss_and_the_global_random_state_neither_matters_nor_moves() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.rand(len(results) + 1)
        before = torch.get_rng_state()
        bank, random, models = bank_of(20, 20, LENET_SHAPE), generator(seed), (small_ensemble(2), small_model(7))
        loss = objective().bound(*models, bank, LENET_SHAPE, random)
        images, places = bank.sample(16, random)
        shown = [observe(model, images, features="penultimate") for model in models]
        results.append([loss(shown[1], shown[0], places).item() for _ in range(2)])
        assert torch.equal(before, torch.get_rng_state())
    assert results[0] == results[1] != results[2]
    assert results[0][0] != results[0][1]  # new negatives, and a memory of the first time


@pytest.mark.parametrize("training", [True, False])
def test_binding_leaves_the_student_as_it_was(training: bool) -> None:
    student = small_model(7).train(training)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    loss = objective().bound(small_model(0), student, Bank(3), LENET_SHAPE, generator())
    assert student.training is training and all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(p.requires_grad for p in loss.parameters()) and len(list(loss.parameters())) == 4


def test_a_model_without_a_final_linear_layer_is_refused() -> None:
    with pytest.raises(TeacherError, match="no linear layer"):
        objective().bound(two_layers(0), nn.Sequential(nn.Conv2d(1, 2, (2, 4)), nn.Flatten()), Bank(3), SHAPE, generator())


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.0}, {"weight": -1.0}, {"projection": 0}, {"negatives": 0}, {"contrast_temperature": 0.0}, {"momentum": 1.0}],
)
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        objective(**change)
