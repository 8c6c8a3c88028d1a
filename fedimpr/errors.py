"""Errors that name what went wrong, where, and what to do about it.

Every error of the project is one line: ``client 3, round 1, training: loss is nan (value nan). Lower the learning rate.``
"""

from __future__ import annotations


class FedimprError(Exception):
    """Base of all errors raised on purpose.

    Args:
        problem: what is wrong, in a few words and without a full stop.
        stage: the step of the work, e.g. ``"training"`` or ``"reading mnist-train.parquet"``.
        client: the partition the problem belongs to.
        round: the federated round, counted from 1.
        value: the offending value; shown with ``repr``.
        remedy: one sentence that says what to do.
    """

    def __init__(
        self,
        problem: str,
        *,
        stage: str | None = None,
        client: int | None = None,
        round: int | None = None,
        value: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem, self.stage, self.client, self.round = problem, stage, client, round
        self.value, self.remedy = value, remedy
        where = ", ".join(
            part
            for part in (
                None if client is None else f"client {client}",
                None if round is None else f"round {round}",
                stage,
            )
            if part is not None
        )
        text = f"{where}: {problem}" if where else problem
        if value is not None:
            text += f" (value {value!r})"
        super().__init__(f"{text}. {remedy}" if remedy else text)


class ConfigError(FedimprError):
    """A setting is unknown, of the wrong type or out of range.

    Args:
        key: the dotted name of the setting, e.g. ``"partition.alpha"``.
        value: what was given.
        allowed: what would have been right, e.g. ``"a number > 0"``.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key, self.allowed = key, allowed
        FedimprError.__init__(self, f"config key '{key}' is {value!r}; allowed: {allowed}")
        self.value = value


class DataError(FedimprError):
    """A data set cannot be read, or holds what it must not hold."""


class PartitionError(FedimprError):
    """A data set cannot be dealt to the clients as asked."""


class UpdateError(FedimprError):
    """What a client sent cannot be used."""


class TeacherError(FedimprError):
    """A teacher lacks what a method needs, or answers with something that is not finite."""
