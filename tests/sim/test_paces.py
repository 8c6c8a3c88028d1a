"""What is known of a turn on a kind of worker that has never done it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.paces import WEIGHT, Paces


def test_nothing_is_known_at_first_but_what_was_seen() -> None:
    paces = Paces()
    assert paces.seconds("cpu", None, None) is None
    assert paces.seconds("cpu", 2.0, "gpu") is None
    assert paces.seconds("cpu", 2.0, "cpu") == 2.0
    assert paces.seconds("cpu", 2.0, None) == 2.0
    assert paces.faster_than("cpu") is None


def test_new_turns_tell_how_long_others_like_them_will_take_and_how_the_kinds_compare() -> None:
    paces = Paces()
    paces.learn("cpu", 8.0, None, None)
    assert paces.seconds("cpu", None, None) == 8.0 and paces.faster_than("cpu") is None
    paces.learn("gpu", 2.0, None, None)
    assert paces.faster_than("cpu") == "gpu" and paces.faster_than("gpu") is None
    assert paces.seconds("cpu", 3.0, "gpu") == 3.0 * 8 / 2
    assert paces.seconds("gpu", 3.0, "cpu") == 3.0 * 2 / 8


def test_a_turn_that_was_last_seen_on_another_kind_corrects_it_and_one_on_the_same_kind_does_not() -> None:
    paces = Paces()
    paces.learn("cpu", 8.0, None, None)
    paces.learn("gpu", 2.0, None, None)
    paces.learn("cpu", 50.0, 5.0, "cpu")
    assert paces.seconds("cpu", None, None) == 8.0
    # 1 s on the GPU and 16 s here: sixteen times as long, where four times was believed. A quarter of the way, in logarithms.
    paces.learn("cpu", 16.0, 1.0, "gpu")
    assert paces.seconds("cpu", 1.0, "gpu") == pytest.approx(4.0**0.75 * 16.0**0.25) and WEIGHT == 0.25


@given(st.floats(0.01, 100.0), st.lists(st.floats(0.01, 100.0), min_size=30, max_size=60))
def test_whatever_was_believed_at_first_the_ratio_is_found(believed: float, works: list[float]) -> None:
    """Turns of any length that take three times as long on one kind, seen on the one and then on the other."""
    paces = Paces()
    paces.learn("gpu", 1.0, None, None)
    paces.learn("cpu", believed, None, None)
    for work in works:
        paces.learn("cpu", 3 * work, work, "gpu")
    assert paces.seconds("cpu", 1.0, "gpu") == pytest.approx(3.0, rel=0.01)
