"""Answers that spread among images, and what a turn learns of them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedimpr.adaptation import Given, LabelSpreading, SourceImpressions, Spreading, evened, levelled, reestimate
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.views import Views
from tests.makers import SHAPE, Linear, small_model

STILL = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)


def method(**other) -> LabelSpreading:
    """Nothing but the vote, unless asked for more."""
    plain = {"share": 0.0, "batch_size": 8, "temperature": 1.0, "sharpness": 1.0, "replay": 0.0}
    return LabelSpreading(
        **{**plain, "spreading": Spreading(neighbours=1, reach=0.0, passes=0), "strong": STILL, "replayed": STILL, **other}
    )


# Spreading


def test_two_images_of_one_direction_meet_in_the_middle() -> None:
    """Each is the other's only neighbour, and S = ((0, 1), (1, 0)). One pass with a reach of 0.5 is the mean of both answers."""
    moved = Spreading(neighbours=1, reach=0.5, passes=1)(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(moved, torch.full((2, 2), 0.5))


def test_images_that_are_not_alike_keep_their_answers() -> None:
    """Two pairs at right angles: no answer crosses, and a wrong one of three in a group is outvoted."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.02], [0.0, 1.0], [0.01, 1.0]])
    answers = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.0, 1.0], [0.0, 1.0]])
    moved = Spreading(neighbours=2, reach=0.9, passes=50)(features, answers)
    assert moved[:3].argmax(1).tolist() == [0, 0, 0] and moved[3:].argmax(1).tolist() == [1, 1]


@given(st.integers(2, 12), st.integers(1, 5), st.floats(0, 0.95), st.integers(0, 6))
def test_it_is_the_papers_iteration_with_a_dense_matrix(count: int, neighbours: int, reach: float, passes: int) -> None:
    features, answers = table(count, 3), table(count, 4, seed=1).softmax(1)
    units = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    directed = np.zeros((count, count))
    for row in range(count):
        for other in np.argsort(-cosines[row])[: min(neighbours, count - 1)]:
            directed[row, other] = max(cosines[row, other], 0) ** 3
    weights = (directed + directed.T) / 2
    roots = np.array([1 / math.sqrt(total) if total > 0 else 0.0 for total in weights.sum(1)])
    s, first = roots[:, None] * weights * roots[None, :], answers.numpy()
    expected = first
    for _ in range(passes):
        expected = reach * s @ expected + (1 - reach) * first
    expected = expected / expected.sum(1, keepdims=True)
    moved = Spreading(neighbours=neighbours, reach=reach, passes=passes)(features, answers)
    torch.testing.assert_close(moved, torch.from_numpy(expected))


def test_an_image_that_is_like_no_other_keeps_its_answer() -> None:
    moved = Spreading(neighbours=5, reach=0.9, passes=3)(torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.7, 0.3], [0.2, 0.8]]))
    torch.testing.assert_close(moved, torch.tensor([[0.7, 0.3], [0.2, 0.8]]))


def test_what_cannot_spread_is_refused() -> None:
    good, settings = (table(3, 2), table(3, 2).softmax(1)), {"neighbours": 1, "reach": 0.5, "passes": 1}
    for key, value, allowed in (("neighbours", 0, ">= 1"), ("passes", -1, ">= 0"), ("reach", 1.0, "[0, 1)")):
        with pytest.raises(ConfigError, match=f"'{key}' is {re.escape(str(value))}.*{re.escape(allowed)}"):
            Spreading(**{**settings, key: value})
    with pytest.raises(FedimprError, match=r"spreading answers: features must be .N, D. with N >= 2"):
        Spreading(**settings)(good[0][:1], good[1][:1])
    with pytest.raises(FedimprError, match="must be of the same images"):
        Spreading(**settings)(good[0], good[1][:2])
    with pytest.raises(FedimprError, match="must be finite"):
        Spreading(**settings)(good[0] * torch.inf, good[1])


# Evening


def test_evened_answers_favour_no_class() -> None:
    """The mean is (0.8, 0.2): 0.9 / 0.8 to 0.1 / 0.2 is 9 to 4, and 0.7 / 0.8 to 0.3 / 0.2 is 7 to 12."""
    expected = torch.tensor([[9 / 13, 4 / 13], [7 / 19, 12 / 19]])
    torch.testing.assert_close(evened(torch.tensor([[0.9, 0.1], [0.7, 0.3]])), expected)


def test_a_class_that_nobody_answers_stays_without_a_share() -> None:
    torch.testing.assert_close(evened(torch.tensor([[1.0, 0.0], [1.0, 0.0]])), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


# Levelling


def test_levelled_logits_have_no_favourite_image_class_or_size() -> None:
    """(4, 0), (2, 2), (0, 4): less each image's mean (2, -2), (0, 0), (-2, 2), classes' means are 0; lengths 8 ** 0.5, 0, 8 ** 0.5."""
    logits, length = torch.tensor([[4.0, 0.0], [2.0, 2.0], [0.0, 4.0]]), 2 * 8**0.5 / 3
    expected = torch.tensor([[2.0, -2.0], [0.0, 0.0], [-2.0, 2.0]]) / length
    torch.testing.assert_close(levelled(logits), expected)
    torch.testing.assert_close(levelled(50 * logits + torch.tensor([9.0, -1.0]) + torch.tensor([[1.0], [2.0], [3.0]])), expected)
    assert torch.equal(levelled(torch.tensor([[3.0, 1.0], [3.0, 1.0]])), torch.zeros(2, 2))


# The vote


def sources(*slopes: float) -> list[nn.Module]:
    """Of two classes; the logits of a pixel x are (slope x, 0)."""
    return [Linear([[slope], [0.0]]).eval().requires_grad_(False) for slope in slopes]


def pixels(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)


def test_a_source_has_one_vote_an_image_however_large_its_logits() -> None:
    """Black and white, logits (0, 0) and (slope, 0). Less the image's mean (0, 0) and (slope, -slope) / 2, less the class's
    (-slope, slope) / 4 and (slope, -slope) / 4, at length one the slope's sign times (-1, 1) / 2 ** 0.5 and (1, -1) / 2 ** 0.5. The loud
    source has 0.3 of that, the quiet one -0.7: (0.4, -0.4) / 2 ** 0.5 of black, the other way round of white, so both classes are even.
    """
    loud, quiet = 100.0, -3.0
    labels = method().labels(sources(loud, quiet), torch.tensor([0.3, 0.7]), pixels(0, 255))
    black = 1 / (1 + math.exp(-0.8 / 2**0.5))
    torch.testing.assert_close(labels, torch.tensor([[black, 1 - black], [1 - black, black]]))


def test_the_vote_has_a_temperature() -> None:
    """Of one source, as above: 2 / 2 ** 0.5 between the classes, at a temperature of 0.5 twice that."""
    labels = method(temperature=0.5).labels(sources(7.0), torch.ones(1), pixels(0, 255))
    assert labels[1, 0].item() == pytest.approx(1 / (1 + math.exp(-4 / 2**0.5)))


def test_sharpness_is_a_power() -> None:
    black_and_white, weights = pixels(0, 255), torch.ones(1)
    soft, sharp = (method(sharpness=s).labels(sources(1.0), weights, black_and_white) for s in (1.0, 2.0))
    torch.testing.assert_close(sharp, soft**2 / (soft**2).sum(1, keepdim=True))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_sources_look_with_statistics_between_their_own_and_the_targets(share: float) -> None:
    """Of one source, without spreading: what a model with mixed statistics answers, levelled, evened before and after the spreading."""
    own = torch.randint(0, 256, (20, *SHAPE), generator=generator(1), dtype=torch.uint8)
    source, moved, mixed = (small_model(3) for _ in range(3))
    reestimate(moved, [own[:8].float() / 255, own[8:16].float() / 255, own[16:].float() / 255], momentum=None)
    before = {key: value.clone() for key, value in source.state_dict().items()}
    after = moved.state_dict()
    mixed.load_state_dict({key: (1 - share) * one + share * after[key] if one.is_floating_point() else one for key, one in before.items()})
    with torch.no_grad():
        expected = evened(evened(levelled(mixed.eval()(own.float() / 255)).softmax(1)))
    torch.testing.assert_close(method(share=share).labels([source.eval()], torch.ones(1), own), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())


# A step


def test_a_step_learns_the_label_and_replays_impressions() -> None:
    """A model of even answers: the cross-entropy with whatever target is ln 2, and 0.5 ln 2 more comes from impressions."""
    white = torch.full((4, 1, 1, 1), 255, dtype=torch.uint8)
    impressions = SourceImpressions(white, torch.tensor([[0.5, 0.5]]).repeat(4, 1), torch.zeros(4, dtype=torch.int64))
    beside = Given(weights=torch.ones(1), sources=sources(1.0), impressions=impressions)
    for replay, expected in ((0.0, 1.0), (0.5, 1.5)):
        bound = method(replay=replay).bound(Linear([[0.0], [0.0]]), pixels(0, 80, 160, 255), beside, generator())
        loss = bound.loss(torch.rand(4, 1, 1, 1, generator=generator()), torch.tensor([0, 1, 2, 3]), 0.0)
        assert loss.item() == pytest.approx(expected * math.log(2))


def test_half_of_the_images_are_changed_strongly() -> None:
    seen = list[torch.Tensor]()

    def black(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(images)
        return torch.zeros_like(images)

    class Told(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return super().forward(x)

    bound = method(strong=black).bound(
        Told([[0.0], [0.0]]), pixels(0, 80, 160, 255), Given(weights=torch.ones(1), sources=sources(1.0)), generator()
    )
    bound.loss(torch.ones(3, 1, 1, 1), torch.tensor([0, 1, 2]), 0.0)
    assert seen[0].shape[0] == 2 and seen[1].flatten().tolist() == [1.0, 0.0, 0.0]


def test_impressions_are_needed_where_they_have_a_weight() -> None:
    assert method(replay=0.0).needs == {"sources"} and method(replay=0.1).needs == {"sources", "impressions"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("share", 1.5),
        ("batch_size", 1),
        ("temperature", 0.0),
        ("sharpness", 0.0),
        ("replay", -0.1),
    ],
)
def test_numbers_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is {re.escape(str(value))}"):
        method(**{key: value})
