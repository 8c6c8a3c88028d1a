"""How long a turn takes on a worker of another kind than the one that it was last seen on."""

from __future__ import annotations

WEIGHT = 0.25  # of what was seen last


class Paces:
    """The seconds of a turn that nobody has seen yet, by kind of worker, and by that how much longer one kind takes than another.

    It learns from turns that are new, and from those that were last seen on another kind.
    """

    def __init__(self) -> None:
        self._paces: dict[str, float] = {}

    def seconds(self, kind: str, predicted: float | None, seen_on: str | None) -> float | None:
        """What a turn will take on a worker of a kind; nothing where nobody knows.

        Args:
            kind: of the worker.
            predicted: seconds that the turn took last time; nothing where it is new.
            seen_on: the kind that it was on then; nothing where it makes no difference.
        """
        pace, there = self._paces.get(kind), self._paces.get(seen_on or kind)
        if predicted is None:
            return pace
        if seen_on in (None, kind):
            return predicted
        return None if pace is None or there is None else predicted * pace / there

    def learn(self, kind: str, seconds: float, predicted: float | None, seen_on: str | None) -> None:
        """Take in what a turn took on a worker of a kind."""
        there = self._paces.get(seen_on or kind)
        if predicted is None:
            seen = seconds
        elif seen_on in (None, kind) or there is None:
            return
        else:
            seen = there * seconds / predicted
        before = self._paces.get(kind)
        self._paces[kind] = seen if before is None else before ** (1 - WEIGHT) * seen**WEIGHT

    def faster_than(self, kind: str) -> str | None:
        """The fastest kind, where that is another one and both are known."""
        fastest = min(self._paces, key=self._paces.__getitem__, default=kind)
        return fastest if kind in self._paces and fastest != kind else None
