"""Progress: rare lines without a terminal, a short picture on one, and next to no cost per call."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sim import progress as module
from sim.progress import Progress
from sim.results import Row
from sim.stages import Rounds, Stage, Work, duration
from sim.tables import markdown, results
from sim.view import View


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


# --- lines ---


def test_a_stage_speaks_every_five_seconds_and_at_its_end(clock: Clock) -> None:
    progress, out = plain()
    with progress:
        for step in range(1, 121):  # ten calls a second for twelve seconds
            progress("mining DI", step, 120, loss=torch.tensor(1 / 8))
            clock.now += 0.1
    # After 50 of the 119 steps that follow the first, 5 s have passed: 50 steps took 5 s, so 69 more take 6.9 s.
    assert out.getvalue().splitlines() == [
        "mining DI: 51/120, loss 0.125, 10 steps/s, 7 s left",
        "mining DI: 101/120, loss 0.125, 10 steps/s, 2 s left",
        "mining DI: 120/120, loss 0.125, 10 steps/s, took 12 s",
    ]


def test_lines_say_the_round_and_what_is_known_of_the_run(clock: Clock) -> None:
    progress, out = plain()
    for round in (1, 2):
        progress.round(round, 3)
        for client in range(9):
            progress("training clients", client, 8)
            clock.now += 1
    # The first line comes 5 s after the start, when 5 of 8 clients were trained at 1 a second. Then 3 s are left of this round, and two
    # more rounds take 8 s each; stages that nobody has heard of yet may follow. The second round begins after 9 s; 4 s into it, where the
    # last line was 5 s ago, the rounds that are over took 9 s each: 5 s are left of this one, and 9 s of the next.
    assert out.getvalue().splitlines() == [
        "round 1 of 3, training clients: 5/8, 1 clients/s, 3 s left; the run: 5 s, at least 19 s left",
        "round 1 of 3, training clients: 8/8, 1 clients/s, took 8 s; the run: 8 s, at least 16 s left",
        "round 2 of 3, training clients: 4/8, 1 clients/s, 4 s left; the run: 13 s, 14 s left",
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


def test_the_unit_is_a_choice_but_clients_are_clients(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out), unit="images")
    for name in ("mining di", "training clients"):
        progress(name, 0, 2)
        clock.now += 0.5
        progress(name, 2, 2)
    assert [line.split(", ")[1] for line in out.getvalue().splitlines()] == ["4 images/s", "4 clients/s"]


# --- time ---


def test_stages_that_alternate_are_timed_apart(clock: Clock) -> None:
    """A step of mining takes 0.1 s and one of distilling 0.4 s, in portions of ten."""
    progress, _ = plain()
    for portion in range(2):
        for name, seconds in (("mining", 0.1), ("distilling", 0.4)):
            for step in range(10):
                clock.now += seconds
                progress(name, 10 * portion + step + 1, 40)
    mining, distilling = progress.work.stages.values()
    # 19 steps follow the first; the time before the first call belongs to nobody.
    assert mining.rate == pytest.approx(10) and mining.left == pytest.approx(20 * 0.1)
    assert distilling.rate == pytest.approx(2.5) and distilling.left == pytest.approx(20 * 0.4)


def test_a_stage_of_a_new_round_counts_from_its_start_and_remembers_what_it_took(clock: Clock) -> None:
    progress, _ = plain()
    for round in (1, 2):
        progress.round(round, 2)
        for step in range(5):
            progress("mining", step, 4 if round == 1 else 8)
            clock.now += round
        clock.now += 100  # evaluation
    (stage,) = progress.work.stages.values()
    assert (stage.before, stage.spent, stage.left) == pytest.approx((4 * 1, 4 * 2, 4 * 2))


def test_a_stage_that_was_left_open_is_over_with_its_round(clock: Clock) -> None:
    progress, _ = plain()
    progress.round(1, 2)
    progress("training clients", 0, 3)
    progress("training clients", 2, 3)  # the third never answered
    progress.round(2, 2)
    assert progress.work.active() == []
    progress("training clients", 0, 3)
    assert [stage.name for stage in progress.work.active()] == ["training clients"]


def working(*stages: tuple[str, int, int, float], rounds: Rounds | None = None) -> Work:
    """Stages by name, what is done of how much, and seconds spent."""
    made = {name: Stage(name, "steps", 0, done, total, spent, ended=done == total) for name, done, total, spent in stages}
    return Work(made, rounds, stages[-1][0] if stages else "")


def test_what_is_left_of_the_run_is_what_its_rounds_took() -> None:
    # Two rounds took 50 s each, and of the third 20 s have passed: 30 s are left of it, and two more follow.
    assert working(rounds=Rounds(begun=0, since=100, round=3, rounds=5, over=2)).left(120) == (30 + 2 * 50, False)
    # It is slower than those: a stage alone wants 90 s more.
    slow = working(("mining", 1, 10, 10.0), rounds=Rounds(0, 100, 3, 5, 2))
    assert slow.left(120) == (9 * 10 + 2 * 50, False)


def test_in_the_first_round_what_is_left_is_a_lower_bound() -> None:
    rounds = Rounds(begun=0, since=0, round=1, rounds=3)
    assert working(("mining", 5, 10, 20.0), rounds=rounds).left(30) == (20 + 2 * (30 + 20), True)
    assert working(rounds=Rounds(0, 0, 1, 1)).left(30) is None  # of one round, where nothing is at work
    assert working().left(30) is None
    ended = working(("mining", 5, 10, 20.0), rounds=rounds)
    ended.ended = True
    assert ended.told(30) == ("round 1 of 3", "30 s", "")


def test_durations_are_words() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 3599, 3600, 7384)] == [
        "0 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "2 h 03 min",
    ]


# --- the picture ---


def drawn(work: Work, width: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    console.print(View(console, work)())
    return [line.rstrip() for line in out.getvalue().splitlines()]


ROUNDS = Rounds(begun=0, since=0, round=2, rounds=10)


def test_the_picture_folds_what_is_over_and_has_a_bar_for_what_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.view.time", Clock())
    rounds = Rounds(begun=900, since=950, round=2, rounds=3, over=1)
    work = working(("training clients", 10, 10, 61.0), ("mining di", 20, 20, 5.0), ("distilling di", 50, 100, 5.0), rounds=rounds)
    work.stages["distilling di"].words = "loss 0.25"
    # The first round took 50 s, and so long did this one until now; 5 s are left of its stage, and 50 s of the round to come.
    assert drawn(work, 80) == [
        "round 2 of 3, distilling di, 1 min 40 s, 55 s left",
        "done: mining di 5 s, training clients 1 min 01 s",
        "distilling di  " + 10 * "━" + 10 * " " + "  50/100  10 steps/s  5 s left  loss 0.25",  # half of 20
    ]
    assert drawn(work, 40) == [
        "round 2 of 3, 1 min 40 s, 55 s left",
        "done: mining di 5 s, training clients 1…",
        "distilling di  50/100  5 s left",
    ]


def test_with_many_stages_the_picture_stays_short() -> None:
    methods = [f"{verb} method_{n}" for n in range(12) for verb in ("mining", "distilling")]
    lines = drawn(working(*((name, 5, 5, 1.0) for name in methods), ("mining di", 1, 2, 3.0), rounds=ROUNDS), 80)
    assert len(lines) == 3 and lines[1].startswith("done: distilling method_11 1 s, mining method_11 1 s") and lines[1].endswith("…")


STAGES = st.lists(
    st.tuples(st.text(min_size=1, max_size=40), st.integers(0, 10**7), st.integers(1, 10**7), st.floats(0, 1e6)),
    max_size=5,
    unique_by=lambda stage: stage[0],
)


@given(stages=STAGES, width=st.integers(10, 200), rounds=st.sampled_from([None, ROUNDS]))
def test_no_line_is_wider_than_the_terminal(stages: list[tuple[str, int, int, float]], width: int, rounds: Rounds | None) -> None:
    work = working(*((f"mining {n}", min(done, total), total, spent) for n, (_, done, total, spent) in enumerate(stages)), rounds=rounds)
    lines = drawn(work, width)
    assert all(len(line) <= width for line in lines)
    assert len(lines) == (rounds is not None) + bool(work.over()) + len(work.active())


def test_a_terminal_shows_the_last_picture_when_all_is_over() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120)) as progress:
        progress.round(1, 1)
        for portion in range(2):
            for step in range(1, 11):
                progress("mining [DI]", step, 10, loss=0.5)
            progress("distilling DI", 5 * (portion + 1), 10, loss=torch.tensor(0.25))
    last = out.getvalue()[out.getvalue().rindex("round 1 of 1") :]
    assert "done: distilling DI 0 s, mining [DI] 0 s" in last and "left" not in last


def test_a_dumb_terminal_gets_lines(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, _environ={"TERM": "dumb"})) as progress:
        progress("a", 1, 1)
    assert out.getvalue() == "a: 1/1, took 0 s\n"


def test_warnings_go_above_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hydra sets logging up: a handler that holds the process's stderr."""
    err, out = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with Progress(Console(file=out, force_terminal=True, width=80)) as progress:
            progress("mining", 1, 2)
            logging.getLogger("any").warning("excluded: client 3")
        assert handler.stream is err
    finally:
        logging.getLogger().removeHandler(handler)
    assert err.getvalue() == "" and "excluded: client 3" in out.getvalue()


# --- cost ---


def test_a_loss_is_looked_at_four_times_a_second() -> None:
    looked: list[int] = []

    class Loss:
        def __str__(self) -> str:
            looked.append(1)
            return "x"

    start = time.monotonic()
    with Progress(Console(file=io.StringIO(), force_terminal=True, width=120)) as progress:
        while time.monotonic() - start < 0.6:
            progress("mining", 1, 1000, loss=Loss())
    assert 1 <= len(looked) <= 2  # after 0.25 and 0.5 s


@pytest.mark.parametrize("terminal", [False, True])
def test_a_call_that_shows_nothing_is_cheap_and_leaves_the_loss_alone(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loss:
        def __str__(self) -> str:
            raise AssertionError("looked at")

    monkeypatch.setattr(module, "DRAW", 60.0)
    monkeypatch.setattr(module, "SAY", 60.0)
    progress = Progress(Console(file=io.StringIO(), force_terminal=terminal))
    loss = Loss()
    fastest = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for step in range(500):
            progress("mining", step, 10**6, loss=loss)
        fastest = min(fastest, (time.perf_counter() - start) / 500)
    assert fastest < 5e-6


def test_an_error_inside_passes_through_and_the_picture_stops() -> None:
    with pytest.raises(KeyError), Progress(Console(file=io.StringIO(), force_terminal=True)) as progress:
        progress("mining", 1, 2)
        raise KeyError


# --- tables ---


def test_the_table_is_markdown_in_plain_characters() -> None:
    rows = [Row("mean client", 0.3121, None, 312.14), Row("student by [DI]", 0.5, 0.7652, 0.25)]
    assert results(rows).splitlines() == [
        "| method          | accuracy (%) | ratio to the ensemble | seconds |",
        "|-----------------|--------------|-----------------------|---------|",
        "| mean client     |        31.21 |                     - |   312.1 |",
        "| student by [DI] |        50.00 |                 0.765 |     0.2 |",
    ]


def test_a_table_of_nothing_has_a_head_and_bars_and_newlines_in_cells_break_nothing() -> None:
    assert results([]).count("\n") == 1
    assert markdown(("a", "b"), [("x|y", "1\n2")]).splitlines()[2] == r"| x\|y | 1 2 |"
