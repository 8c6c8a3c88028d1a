"""How far a run is: its rounds, the loops inside of them, how fast they go and how long they will."""

from __future__ import annotations

from dataclasses import dataclass, field

POINTS = 100  # of a curve


def is_point(done: int, total: int) -> bool:
    """Whether this step of a loop is one of the hundred that become points of its curve."""
    return done % max(1, total // POINTS) == 0


@dataclass
class Stage:
    """A loop that tells how far it is.

    Attributes:
        name: e.g. ``"mining di"``.
        unit: what it counts, e.g. ``"steps"``.
        first: how far it was when it first told so in this round.
        done: how far it is.
        total: how far it goes.
        spent: seconds since it first told, without those that other stages took in between.
        before: seconds of earlier rounds.
        words: what it tells beside, e.g. ``"loss 0.3"``.
        ended: whether it is through in this round.
        said: whether its end was told of in a line.
    """

    name: str
    unit: str
    first: int
    done: int
    total: int
    spent: float = 0.0
    before: float = 0.0
    words: str = ""
    ended: bool = False
    said: bool = False

    @property
    def rate(self) -> float | None:
        """Units a second in this round; unknown before the second call."""
        return (self.done - self.first) / self.spent if self.done > self.first and self.spent > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds until it is through, where it goes on as before and no other stage comes in between."""
        return 0.0 if self.ended else (self.total - self.done) / self.rate if self.rate else None


@dataclass
class Rounds:
    """The rounds of a run.

    Attributes:
        begun: when this process told of the first one.
        since: when the present one began.
        round: its number, from 1.
        rounds: how many there are.
        over: how many have ended in this process.
    """

    begun: float
    since: float
    round: int
    rounds: int
    over: int = 0


@dataclass
class Work:
    """All that is known of a run's progress.

    Attributes:
        stages: by name, in the order in which they first came.
        rounds: where the run has rounds.
        current: the name of the stage that was heard of last.
        ended: whether the run has, well or not.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    rounds: Rounds | None = None
    current: str = ""
    ended: bool = False

    def active(self) -> list[Stage]:
        """The stages that are at work; several where they alternate."""
        return [stage for stage in list(self.stages.values()) if not stage.ended]

    def over(self) -> list[Stage]:
        """The stages that are through, the last one first."""
        return [stage for stage in list(self.stages.values()) if stage.ended][::-1]

    def left(self, now: float) -> tuple[float, bool] | None:
        """Seconds until the run ends, and whether it may take longer; ``None`` where nothing is known.

        The rounds to come take as long as those that are over. In the first round nobody knows which stages are still to come.
        """
        if self.rounds is None or self.ended:
            return None
        stages, spent = sum(stage.left or 0.0 for stage in self.active()), now - self.rounds.since
        more = self.rounds.rounds - self.rounds.round
        if self.rounds.over:
            mean = (self.rounds.since - self.rounds.begun) / self.rounds.over
            return max(mean - spent, stages) + more * mean, False
        least = stages + more * (spent + stages)
        return (least, True) if least >= 1 else None

    def told(self, now: float) -> tuple[str, str, str]:
        """The round, the time since this process began with the run, and the time that is left; empty where unknown."""
        if self.rounds is None:
            return "", "", ""
        left = self.left(now)
        rest = "" if left is None else f"{'at least ' if left[1] else ''}{duration(left[0])} left"
        return f"round {self.rounds.round} of {self.rounds.rounds}", duration(now - self.rounds.begun), rest


def duration(seconds: float) -> str:
    """Whole seconds in words: ``"1 min 05 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def speed(stage: Stage) -> str:
    """How fast it goes, in words: ``"12 steps/s"``; empty where unknown."""
    rate = stage.rate
    if rate is None:
        return ""
    return f"{rate:,.0f} {stage.unit}/s" if rate >= 10 else f"{rate:.2g} {stage.unit}/s"
