"""How useful the sources are for a target."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.adaptation import reestimate, statistics_of, survey, usefulness
from fedimpr.errors import FedimprError
from tests.makers import SHAPE, Linear, small_model

WHITE = (torch.eye(3).repeat(3, 1) * 255).byte().view(-1, 1, 1, 3)  # three images of each of three classes


def source(order: list[int], strength: float = 40.0) -> Linear:
    """Answers class ``order[k]`` where the k-th pixel is white."""
    return Linear((strength * torch.eye(3)[order].T).tolist())


def weights(*sources: Linear) -> list[float]:
    found = survey(sources, WHITE, batch_size=4)
    return usefulness(found.information, found.agreement).tolist()


def test_information_and_agreement_by_hand() -> None:
    """Sure answers of all classes: ln 3. Two that are the same: 1 - 1/3. Two that never are: 0 - 1/3."""
    found = survey([source([0, 1, 2]), source([1, 2, 0])], WHITE, batch_size=4)
    assert found.information.tolist() == pytest.approx([math.log(3)] * 2)
    assert found.agreement.flatten().tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 2 / 3])
    assert found.statistics == [{}, {}]


def test_a_source_with_another_order_of_the_labels_is_of_no_use_beside_two_that_agree() -> None:
    assert weights(source([0, 1, 2]), source([1, 2, 0]), source([0, 1, 2])) == pytest.approx([0.5, 0.0, 0.5])


def test_a_source_that_is_seldom_sure_is_of_less_use() -> None:
    """With strength 1.5 it answers p = e^1.5 / (e^1.5 + 2) = 0.691 and twice 0.154: information ln 3 - 0.832 = 0.266 nats.

    It agrees with a sure one by p - 1/3 = 0.358; these with each other by 2/3. So 0.266 * 0.716 against 1.0986 * 1.025, twice.
    """
    assert weights(source([0, 1, 2]), source([0, 1, 2], 1.5), source([0, 1, 2])) == pytest.approx([0.4610, 0.0780, 0.4610], abs=1e-3)


def test_a_source_that_always_answers_the_same_is_of_no_use() -> None:
    constant = Linear([[40.0] * 3, [0.0] * 3, [0.0] * 3])
    assert weights(source([0, 1, 2]), constant, source([0, 1, 2])) == pytest.approx([0.5, 0.0, 0.5], abs=1e-6)


def test_of_one_source_or_two_that_contradict_each_other_nobody_is_left_out() -> None:
    assert weights(source([1, 2, 0])) == [1.0]
    assert weights(source([0, 1, 2]), source([1, 2, 0])) == pytest.approx([0.5, 0.5])
    assert usefulness(torch.zeros(2), torch.zeros(2, 2)).tolist() == [0.5, 0.5]


@given(st.integers(1, 5).flatmap(lambda m: st.tuples(st.lists(st.floats(0, 3), min_size=m, max_size=m), st.integers(0, 9))))
def test_weights_are_shares(drawn: tuple[list[float], int]) -> None:
    information, seed = torch.tensor(drawn[0], dtype=torch.float64), drawn[1]
    agreement = torch.rand(len(information), len(information), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    before = agreement.clone()
    found = usefulness(information, agreement)
    assert float(found.min()) >= 0 and float(found.sum()) == pytest.approx(1) and torch.equal(agreement, before)


def test_what_is_not_finite_or_of_another_shape_is_refused() -> None:
    with pytest.raises(FedimprError, match="agreement must be .M, M. for M sources"):
        usefulness(torch.zeros(2), torch.zeros(3, 3))
    with pytest.raises(FedimprError, match="information and agreement must be finite"):
        usefulness(torch.tensor([math.nan]), torch.zeros(1, 1))


def test_a_survey_gives_the_targets_statistics_and_leaves_the_sources_theirs() -> None:
    model, expected = small_model(0), small_model(0)
    own = torch.randint(0, 256, (20, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = survey([model], own, batch_size=20)
    reestimate(expected, [own.float() / 255], momentum=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.statistics[0].keys() == statistics_of(expected).keys()
    assert all(torch.equal(tensor, statistics_of(expected)[name]) for name, tensor in found.statistics[0].items())
