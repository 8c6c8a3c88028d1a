"""The server's long work of a round, in pieces that do not depend on each other: who does them, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

Result = TypeVar("Result")


class Crew(Protocol):
    """Does the pieces of a round.

    Each piece keeps its state as the part of the round that it is named after (:class:`~strategies.keep.Keep`), its end included. So one
    that was brought to its end elsewhere only has to be taken over.
    """

    def work(self, round: int, pieces: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
        """What the pieces return, by their names and in their order."""


class Alone:
    """One piece after another, here."""

    def work(self, round: int, pieces: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
        """As :meth:`Crew.work`."""
        return {name: piece() for name, piece in pieces.items()}
