"""The inner loop of every method, on a parabola that can be followed by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from fedimpr.errors import FedimprError
from fedimpr.synthesis.descent import Diverged, Mined, descend, mine_batches


def descent(lr: float, steps: int, keep: str, *, start: float = 1.0, breaks: dict[str, int] | None = None, **more):
    """From x = ``start`` down x^2 with plain gradients: a step takes x to (1 - 2 lr) x. ``breaks`` says in which step which term breaks.

    Returns the image, what was drawn in each step, and what was told.
    """
    x = torch.full((1, 1, 1, 1), start, requires_grad=True)
    drawn: list[float] = []
    told: list[tuple[int, float]] = []

    def draw() -> Tensor:
        if torch.is_grad_enabled():
            drawn.append(x.item())
        return x

    def terms(images: Tensor) -> dict[str, Tensor]:
        broken = [name for name, step in (breaks or {}).items() if step == len(drawn)]
        nothing = {name: images.sum() * 0 + (float("nan") if name in broken else 0) for name in (breaks or {})}
        return {"square": images.square().sum(), **nothing}

    projected = more.pop("project", None)
    project = {} if projected is None else {"project": lambda: projected(x)}
    try:
        image = descend(
            draw, terms, [torch.optim.SGD([x], lr)], steps=steps, told=lambda step, loss: told.append((step, loss.item())), keep=keep,
            **project, **more,
        )  # fmt: skip
    except Diverged as error:
        return error, drawn, told
    return image, drawn, told


def test_the_path_down_a_parabola() -> None:
    """With lr 1/4 every step halves x: 1, 1/2, 1/4, and 1/8 after the third; the losses are their squares."""
    image, drawn, told = descent(0.25, 3, "last")
    assert drawn == [1.0, 0.5, 0.25] and told == [(1, 1.0), (2, 0.25), (3, 0.0625)]
    assert image.item() == 0.125 and not image.requires_grad


def test_the_best_images_are_those_of_the_least_loss_that_was_seen() -> None:
    """Falling, the last that was judged; rising (lr 3/2: x becomes -2 x), the first."""
    assert descent(0.25, 3, "best")[0].item() == 0.25
    image, drawn, _ = descent(1.5, 3, "best")
    assert drawn == [1.0, -2.0, 4.0] and image.item() == 1.0 and not image.requires_grad
    assert descent(1.5, 3, "last")[0].item() == -8.0


def test_of_equal_losses_the_first_is_best() -> None:
    """With lr 1 the sign changes and nothing else."""
    assert descent(1.0, 4, "best")[0].item() == 1.0


def test_what_leaves_its_range_is_brought_back_after_every_step() -> None:
    """1, 1/2, then 1/4 is brought back to 0.3, and 0.15 is, too."""
    calls: list[float] = []

    def project(x: Tensor) -> None:
        calls.append(x.item())
        x.clamp_(min=0.3)

    image, drawn, _ = descent(0.25, 3, "last", project=project)
    assert calls == pytest.approx([0.5, 0.25, 0.15]) and drawn == pytest.approx([1.0, 0.5, 0.3])
    assert image.item() == pytest.approx(0.3)


def test_all_optimisers_step_and_forget_their_gradients() -> None:
    """The loss x^2 + y^2, x halved and y quartered by its own rate."""
    x, y = (torch.ones(1, 1, 1, 1, requires_grad=True) for _ in range(2))
    optimisers = [torch.optim.SGD([x], 0.25), torch.optim.SGD([y], 0.375)]
    terms = lambda images: {"x": images.square().sum(), "y": y.square().sum()}  # noqa: E731
    descend(lambda: x, terms, optimisers, steps=2, told=lambda step, loss: None, keep="last")
    assert x.item() == 0.25 and y.item() == 0.0625


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_term_that_is_not_finite_is_named_with_its_first_step(keep: str) -> None:
    error, drawn, told = descent(0.25, 5, keep, breaks={"late": 4, "early": 2})
    assert isinstance(error, Diverged) and (error.term, error.step) == ("early", 2)
    assert str(error) == "synthesis: the early term was not finite in step 2. Lower the learning rate."
    assert len(drawn) == len(told) == 5  # progress does not stop short


def test_infinity_is_not_finite_either() -> None:
    """The square of 1e30 leaves float32."""
    error, *_ = descent(0.25, 2, "best", start=1e30)
    assert isinstance(error, Diverged) and (error.term, error.step) == ("square", 1)


def test_a_loss_without_terms_is_refused() -> None:
    """As where the only term needs batch norm and the teacher has none."""
    x = torch.ones(1, 1, 1, 1, requires_grad=True)
    with pytest.raises(FedimprError, match="no term is left"):
        descend(lambda: x, lambda images: {}, [], steps=1, told=lambda step, loss: None, keep="best")


# Batch after batch


def mining(outcomes: list[str], steps: int = 3) -> tuple[Mined, list[tuple[str, int, int]]]:
    """Batches of two images that all show the number of their batch; those whose outcome is ``"bad"`` diverge."""
    ticks: list[tuple[str, int, int]] = []

    def mine(batch: int, told) -> Mined:
        for step in range(1, steps + 1):
            told(step, torch.zeros(()))
        if outcomes[batch] == "bad":
            raise Diverged("target", 2)
        return Mined(torch.full((2, 1, 1, 1), float(batch)), torch.full((2,), 10 * batch))

    return mine_batches(len(outcomes), steps, lambda stage, done, total, **info: ticks.append((stage, done, total)), mine), ticks


def test_batches_follow_each_other_and_progress_ends_at_its_total() -> None:
    mined, ticks = mining(["good", "good"])
    assert mined.images.flatten().tolist() == [0, 0, 1, 1] and mined.labels.tolist() == [0, 0, 10, 10]
    assert ticks == [("mining", done, 6) for done in range(1, 7)]


def test_a_batch_that_diverges_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mined, ticks = mining(["good", "bad", "good"])
    assert mined.images.flatten().tolist() == [0, 0, 2, 2] and mined.labels.tolist() == [0, 0, 20, 20]
    (record,) = caplog.records
    expected = "batch 2 of 3 is left out: synthesis: the target term was not finite in step 2. Lower the learning rate."
    assert record.getMessage() == expected
    assert ticks[-1] == ("mining", 9, 9)


def test_without_any_good_batch_the_failure_is_raised() -> None:
    with pytest.raises(Diverged, match="target term was not finite in step 2"):
        mining(["bad", "bad"])
