"""Progress: rare lines without a terminal, bars on one, and next to no cost per call."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from sim import progress as module
from sim.progress import Progress, table
from sim.results import Row


class Clock:
    """Stands in for the module ``time``."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


def plain() -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, force_terminal=False, width=40)), out


def test_a_stage_speaks_every_five_seconds_and_at_its_end(clock: Clock) -> None:
    progress, out = plain()
    with progress:
        for step in range(1, 121):  # ten calls a second for twelve seconds
            progress("mining DI", step, 120, loss=torch.tensor(1 / 8))
            clock.now += 0.1
    # After 50 of the 119 steps that follow the first, 5 s have passed: 50 steps took 5 s, so 69 more take 6.9 s.
    assert out.getvalue().splitlines() == [
        "mining DI: 51/120, loss 0.125, 7 s left",
        "mining DI: 101/120, loss 0.125, 2 s left",
        "mining DI: 120/120, loss 0.125, took 12 s",
    ]


def test_a_stage_that_starts_and_ends_again_and_again_does_not_flood(clock: Clock) -> None:
    progress, out = plain()
    for _ in range(300):  # 300 portions in 60 s
        progress("mining CMI", 1, 2)
        clock.now += 0.1
        progress("mining CMI", 2, 2)
        clock.now += 0.1
    assert 2 <= len(out.getvalue().splitlines()) <= 1 + 60 / 5


def test_stages_are_counted_apart(clock: Clock) -> None:
    progress, out = plain()
    progress("a", 1, 1)
    progress("b", 1, 1)
    assert out.getvalue().splitlines() == ["a: 1/1, took 0 s", "b: 1/1, took 0 s"]


def test_text_is_never_markup(clock: Clock) -> None:
    progress, out = plain()
    progress("[red]a[/nothing]", 1, 1, note="[b]")
    assert out.getvalue() == "[red]a[/nothing]: 1/1, note [b], took 0 s\n"


def test_a_terminal_shows_a_bar_for_each_stage() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120)) as progress:
        for portion in range(2):
            for step in range(1, 11):
                progress("mining [DI]", step, 10, loss=0.5)
            progress("distilling DI", 5 * (portion + 1), 10, loss=torch.tensor(0.25))
    last = [line for line in out.getvalue().splitlines() if "10/10" in line][-2:]
    assert "mining [DI]" in last[0] and "loss 0.5" in last[0]
    assert "distilling DI" in last[1] and "loss 0.25" in last[1]


def test_drawing_stays_below_ten_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    start = time.monotonic()
    drawn: list[int] = []
    with Progress(Console(file=out, force_terminal=True, width=120)) as progress:
        monkeypatch.setattr(progress, "_draw", lambda bars, stage, state, done, total, info: drawn.append(done))
        while time.monotonic() - start < 0.35:
            progress("mining", 1, 1000)
    assert 2 <= len(drawn) <= 4  # at 0, 0.1, 0.2 and 0.3 s


def test_a_call_that_shows_nothing_is_cheap_and_leaves_the_loss_alone() -> None:
    class Loss:
        def __str__(self) -> str:
            raise AssertionError("looked at")

    progress, _ = plain()
    loss = Loss()
    fastest = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for step in range(500):
            progress("mining", step, 10**6, loss=loss)
        fastest = min(fastest, (time.perf_counter() - start) / 500)
    assert fastest < 5e-6


def test_an_error_inside_passes_through_and_the_bars_stop() -> None:
    with pytest.raises(KeyError), Progress(Console(file=io.StringIO(), force_terminal=True)) as progress:
        progress("mining", 1, 2)
        raise KeyError


def test_the_table_is_markdown_in_plain_characters() -> None:
    rows = [Row("mean client", 0.3121, None, 312.14), Row("student by [DI]", 0.5, 0.7652, 0.25)]
    assert table(rows).splitlines() == [
        "| method          | accuracy (%) | ratio to the ensemble | seconds |",
        "|-----------------|--------------|-----------------------|---------|",
        "| mean client     |        31.21 |                     - |   312.1 |",
        "| student by [DI] |        50.00 |                 0.765 |     0.2 |",
    ]
