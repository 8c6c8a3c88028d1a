"""KD3A: the vote of the sources, the quality of their consensus, their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedimpr.adaptation import KnowledgeVote, source_weights
from fedimpr.errors import ConfigError, FedimprError

VOTE = KnowledgeVote(gate=0.5, undecided=0.001)


def one_image(*predictions: list[float]) -> torch.Tensor:
    """Predictions (M, 1, K)."""
    return torch.tensor(predictions, dtype=torch.float64)[:, None]


def predictions(sources: int = 3, images: int = 4, classes: int = 3) -> st.SearchStrategy[torch.Tensor]:
    """(M, N, K) with rows that add up to one."""
    values = arrays.arrays(np.float64, (sources, images, classes), elements=st.floats(0.01, 20))
    return values.map(lambda found: torch.from_numpy(found / found.sum(2, keepdims=True)))


def looped(given_: np.ndarray, gate: float, undecided: float) -> tuple[list[list[float]], list[float]]:
    """The vote image by image, in plain Python."""
    targets, weights = [], []
    for rows in np.swapaxes(given_, 0, 1):
        voters = [row for row in rows if row.max() > gate]
        chosen = int(np.sum(voters, axis=0).argmax()) if voters else -1
        supporters = [row for row in voters if row.argmax() == chosen]
        targets.append(np.mean(supporters or rows, axis=0).tolist())
        weights.append(len(supporters) or undecided)
    return targets, weights


# The vote


def test_the_target_is_the_mean_prediction_of_those_that_are_confident_of_the_consensus_class() -> None:
    """Class 0 has 0.8 + 0.6 + 0.3, class 1 has 0.1 + 0.3 + 0.7; the last source votes, but for another class."""
    found = VOTE(one_image([0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.3, 0.7, 0.0]))
    assert found.targets.tolist() == [pytest.approx([0.7, 0.2, 0.1])]
    assert found.weights.tolist() == [2.0] and found.supporters.tolist() == [[True], [True], [False]]


def test_the_gate_keeps_sources_out_that_are_not_confident() -> None:
    """Two sources for class 1 with 0.5, no more than the gate; the third is confident of class 0."""
    found = VOTE(one_image([0.45, 0.5, 0.05], [0.45, 0.5, 0.05], [0.6, 0.2, 0.2]))
    assert found.targets.tolist() == [pytest.approx([0.6, 0.2, 0.2])] and found.weights.tolist() == [1.0]
    opened = KnowledgeVote(gate=0.4, undecided=0.001)(one_image([0.3, 0.6, 0.1], [0.3, 0.5, 0.2], [0.6, 0.2, 0.2]))
    assert opened.targets.tolist() == [pytest.approx([0.3, 0.55, 0.15])] and opened.weights.tolist() == [2.0]


def test_without_a_confident_source_all_count_a_little() -> None:
    found = VOTE(one_image([0.5, 0.4, 0.1], [0.1, 0.4, 0.5]))
    assert found.targets.tolist() == [pytest.approx([0.3, 0.4, 0.3])]
    assert found.weights.tolist() == [0.001] and not found.supporters.any()


def test_a_consensus_class_that_is_no_ones_first_choice_has_no_supporters() -> None:
    """Class 1 has 0.49 + 0.49, the others 0.51 each."""
    found = VOTE(one_image([0.51, 0.49, 0.0], [0.0, 0.49, 0.51]))
    assert found.targets.tolist() == [pytest.approx([0.255, 0.49, 0.255])] and found.weights.tolist() == [0.001]


@given(predictions(), st.sampled_from([0.0, 0.4, 0.6, 0.9]))
def test_the_vote_is_that_of_plain_loops(given_: torch.Tensor, gate: float) -> None:
    found = KnowledgeVote(gate=gate, undecided=0.001)(given_)
    targets, weights = looped(given_.numpy(), gate, 0.001)
    assert found.weights.tolist() == weights
    assert found.targets.flatten().tolist() == pytest.approx(np.ravel(targets).tolist())


@given(predictions())
def test_targets_are_distributions_and_the_order_of_the_sources_is_nothing(given_: torch.Tensor) -> None:
    found, turned = VOTE(given_), VOTE(given_.flip(0))
    assert found.targets.sum(1).tolist() == pytest.approx([1.0] * 4) and found.targets.min() >= 0
    assert torch.allclose(found.targets, turned.targets) and torch.equal(found.weights, turned.weights)


# The focus


def test_quality_adds_supporters_times_confidence_over_images() -> None:
    """Image 0: two supporters, mean 0.7. Image 1: the sources differ, class 0 has 0.9 + 0.2: one supporter, 0.9."""
    given_ = torch.tensor([[[0.8, 0.2], [0.9, 0.1]], [[0.6, 0.4], [0.2, 0.8]]])
    assert VOTE.quality(given_).item() == pytest.approx(2 * 0.7 + 1 * 0.9)


def test_focus_is_what_the_quality_loses_without_each_source() -> None:
    """As above 2.3. Without source 0: 0.6 + 0.8. Without source 1: 0.8 + 0.9."""
    given_ = torch.tensor([[[0.8, 0.2], [0.9, 0.1]], [[0.6, 0.4], [0.2, 0.8]]])
    assert VOTE.focus(given_).tolist() == pytest.approx([2.3 - 1.4, 2.3 - 1.7])


def test_the_focus_of_a_set_is_the_sum_of_its_batches() -> None:
    given_ = torch.softmax(3 * torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)), 2)
    assert torch.allclose(VOTE.focus(given_), VOTE.focus(given_[:, :5]) + VOTE.focus(given_[:, 5:]), atol=1e-6)


def test_a_source_that_answers_otherwise_than_all_others_has_the_least_focus() -> None:
    """Three sources say 0, the fourth says 1, all with 0.9: with 3 supporters 2.7; without one that agrees 2 * 0.9; without the fourth as
    with it.
    """
    given_ = one_image([0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9])
    assert VOTE.focus(given_).tolist() == pytest.approx([0.9, 0.9, 0.9, 0.0], abs=1e-12)


def test_a_source_that_turns_the_consensus_has_a_focus_below_zero() -> None:
    """Two sources for class 0 with 0.55, confident that it is not class 2, and a third one at 0.99 for class 1: the sums are 1.11 and 1.69.

    The consensus is class 1 with one supporter, 0.99; without the third source it is class 0 with two, 1.1.
    """
    given_ = one_image([0.55, 0.35, 0.1], [0.55, 0.35, 0.1], [0.01, 0.99, 0.0])
    assert VOTE.focus(given_)[2].item() == pytest.approx(0.99 - 1.1)


def test_the_only_source_has_all_the_quality() -> None:
    assert VOTE.focus(one_image([0.8, 0.2])).tolist() == pytest.approx([0.8])


# The weights


def test_weights_are_focus_times_examples() -> None:
    """3 * 100 and 1 * 300, and a source that disturbs."""
    assert source_weights(torch.tensor([3.0, 1.0, -2.0]), torch.tensor([100, 300, 50])).tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_where_no_source_is_of_use_the_examples_decide() -> None:
    assert source_weights(torch.tensor([0.0, -1.0]), torch.tensor([100, 300])).tolist() == pytest.approx([0.25, 0.75])


# Bad input


@pytest.mark.parametrize("shape", [(4, 3), (0, 4, 3), (2, 0, 3)])
def test_predictions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FedimprError, match=r"knowledge vote: predictions must be \(M, N, K\)") as caught:
        VOTE(torch.zeros(shape))
    assert str(shape) in str(caught.value)
    with pytest.raises(FedimprError, match="knowledge vote"):
        VOTE.focus(torch.zeros(shape))


@pytest.mark.parametrize(("key", "value"), [("gate", 1.0), ("gate", -0.1), ("undecided", -1.0)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        KnowledgeVote(**{"gate": 0.5, "undecided": 0.0, key: value})


def test_focus_and_examples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FedimprError, match=r"one number a source \(value \(\(2,\), \(3,\)\)\)"):
        source_weights(torch.zeros(2), torch.ones(3))
    with pytest.raises(FedimprError, match="examples > 0"):
        source_weights(torch.ones(2), torch.tensor([1, 0]))
    with pytest.raises(FedimprError, match="must be finite"):
        source_weights(torch.tensor([1.0, torch.nan]), torch.ones(2))
