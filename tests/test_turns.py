"""Classes in quarter turns: images, outputs, and the model that knows them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import ConfigError, TeacherError
from fedimpr.models import build, final_layer, in_every_turn, rebuild
from fedimpr.synthesis import DataImpressions
from fedimpr.synthesis.targets import ClassSimilarity
from fedimpr.turns import outputs_of, turned, with_turned
from fedimpr.views import Views
from tests.makers import priors, small_model

CORNERS = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])


def test_a_quarter_is_counter_clockwise() -> None:
    assert turned(CORNERS, torch.tensor([1])).flatten().tolist() == [2, 4, 1, 3]
    assert turned(CORNERS, torch.tensor([2])).flatten().tolist() == [4, 3, 2, 1]


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=6))
def test_turned_back_an_image_is_the_same_to_the_bit(quarters: list[int]) -> None:
    images, by = torch.rand(len(quarters), 3, 5, 5), torch.tensor(quarters)
    assert torch.equal(turned(turned(images, by), -by), images)
    assert torch.equal(turned(images, by), turned(images, by + 4))


def test_each_image_comes_upright_and_in_one_other_turn() -> None:
    images, labels = torch.rand(50, 1, 3, 3), torch.arange(50) % 3
    shown, outputs = with_turned(images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(shown[:50], images) and torch.equal(outputs[:50], 4 * labels)
    quarters = outputs[50:] - 4 * labels
    assert set(quarters.tolist()) == {1, 2, 3} and torch.equal(shown[50:], turned(images, quarters))


def test_outputs_of_a_class_follow_each_other() -> None:
    assert outputs_of(torch.tensor([2, 0])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def turned_model():
    return build("lenet5", shape=(1, 8, 8), classes=3, mean=[0.5], std=[0.25], seed=0, batch_norm=True, turned=True).eval()


def test_a_classifier_answers_with_the_mean_over_an_image_in_all_turns() -> None:
    """Class 2 of the image turned by one quarter is output 4 * 2 + 1; the mean of four such outputs is the class's."""
    model, images = turned_model(), torch.rand(5, 1, 8, 8)
    whole = in_every_turn(model)
    assert model(images).shape == (5, 3) and whole(images).shape == (5, 12)
    by_hand = sum(whole(torch.rot90(images, q, (2, 3)))[:, [q, 4 + q, 8 + q]] for q in range(4)) / 4
    torch.testing.assert_close(model(images), by_hand)
    assert final_layer(whole) is final_layer(model)
    assert rebuild(model.spec).turned and not rebuild(whole.spec).turned
    assert {name: tensor.shape for name, tensor in rebuild(whole.spec).state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def test_what_does_not_know_turns_is_its_own_answer() -> None:
    model, other = small_model(), torch.nn.Linear(2, 2)
    assert in_every_turn(model) is model and in_every_turn(other) is other


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.options.turned.*8x12 pixels"):
        build("lenet5", shape=(1, 8, 12), classes=3, mean=[0.5], std=[0.25], seed=0, batch_norm=True, turned=True)


def test_its_upright_answers_alone_do_not_describe_what_data_impressions_need() -> None:
    di = DataImpressions(
        targets=ClassSimilarity(betas=(1.0,), scaling="matrix"), priors=priors(target=1.0), temperature=20.0, steps=1, lr=0.1, batch_size=4,
        variant="text", brightness=1.0, views=Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False),
    )  # fmt: skip
    with pytest.raises(TeacherError, match=r"has 12 outputs, and it answers with 3.*in_every_turn"):
        di.synthesize(turned_model(), 4, torch.Generator(), shape=(1, 8, 8))
    found = di.synthesize(in_every_turn(turned_model()), 12, torch.Generator(), shape=(1, 8, 8))
    assert found.targets.shape == (12, 12) and found.labels.tolist().count(11) == 1
