"""SIGINT and SIGTERM: what a library loses of them comes back."""

import signal
from contextlib import suppress

import pytest

from sim import signals
from sim.__main__ import guarded
from sim.progress import Progress
from sim.signals import Terminated, heed, interrupted, listening

BOTH = [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Terminated, 143)]


@pytest.mark.parametrize(("number", "raised", "status"), BOTH)
def test_what_is_swallowed_comes_back_with_the_next_sign_of_progress(
    number: signal.Signals, raised: type[BaseException], status: int
) -> None:
    bar = Progress()
    with listening():
        with pytest.raises(raised):
            signal.raise_signal(number)
        with pytest.raises(raised):
            bar("mining di", 1, 2)
        assert signals.exit_status() == status
    bar("mining di", 2, 2)  # and is forgotten with the block
    assert signals.exit_status() is None


@pytest.mark.parametrize("becomes", [None, RuntimeError("Error calling __set_name__"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize(("number", "raised", "status"), BOTH)
def test_a_command_ends_with_the_status_of_its_signal_whatever_that_became(
    number: signal.Signals, raised: type[BaseException], status: int, becomes: BaseException | None
) -> None:
    def command() -> None:
        with suppress(BaseException):
            signal.raise_signal(number)
        if becomes is not None:
            raise becomes
        heed()
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as ended:
        guarded(command, "config")
    assert ended.value.code == status


def test_a_run_is_interrupted_by_a_signal_even_where_it_became_an_error() -> None:
    error = RuntimeError("Error calling __set_name__")
    assert not interrupted(error) and interrupted(KeyboardInterrupt())
    with listening():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupted(error)


def test_a_sigint_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            signal.raise_signal(signal.SIGINT)
            heed()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
