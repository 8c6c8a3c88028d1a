"""The loop of a federation, and how it waits."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedimpr.errors import FedimprError, UpdateError
from sim import _flwr
from strategies import cohort
from strategies.cohort import collect, roll_call
from strategies.rounds import exchange

_flwr.join(1, 1)


class SlowGrid:
    """Replies become ready after a number of seconds each; ``None`` is never."""

    def __init__(self, delays: list[float | None]) -> None:
        self.delays, self.start = delays, time.monotonic()

    def push_messages(self, messages) -> list[str]:
        return [str(i) for i in range(len(messages))]

    def pull_messages(self, ids) -> list[str]:
        ready = [(i, self.delays[int(i)]) for i in ids]
        return [f"reply {i}" for i, delay in ready if delay is not None and time.monotonic() - self.start >= delay]


def test_a_silent_client_costs_its_own_reply_only() -> None:
    seen: list[int] = []
    replies = exchange(SlowGrid([0.1, None, 0.0, 0.2]), [None] * 4, 0.4, lambda stage, done, total: seen.append(done))
    assert replies == ["reply 0", "reply 2", "reply 3"]
    assert seen == [0, 1, 1, 2, 3]


def test_a_silent_client_is_named() -> None:
    bad: list[UpdateError] = []
    with pytest.raises(
        UpdateError,
        match="0 good updates of 2, below strategy.minimum_updates = 1; first: client 0, round 3, local training: no reply in time",
    ):
        collect([], {0: 11, 1: 12}, 3, lambda partition: {}, 1, bad.append)
    assert [error.client for error in bad] == [0, 1]


class Registry:
    """A grid whose nodes answer the roll call with the given partitions."""

    def __init__(self, partitions: dict[int, int | Error]) -> None:
        self.partitions = partitions

    def get_node_ids(self) -> list[int]:
        return list(self.partitions)

    def send_and_receive(self, messages, *, timeout) -> list[Message]:
        replies = []
        for message in messages:
            answer = self.partitions[message.metadata.dst_node_id]
            _flwr.number(message, "m")
            content = answer if isinstance(answer, Error) else RecordDict({"who": ConfigRecord({"partition-id": answer})})
            replies.append(Message(content, reply_to=message))
        return replies


def test_nodes_are_told_apart_by_their_partitions_whatever_their_numbers() -> None:
    assert roll_call(Registry({700: 1, 5: 2, 90: 0}), 3) == {0: 90, 1: 700, 2: 5}


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ({7: 0, 8: 0}, "must host partitions 0 to 1, one each"),
        ({7: 0, 8: 5}, "must host partitions 0 to 1, one each"),
        ({7: 0, 8: Error(1, "no partition-id")}, "a client cannot say who it is: no partition-id"),
        ({7: 0}, "1 of 2 clients have registered"),
    ],
)
def test_a_wrong_roll_is_an_error(partitions: dict, message: str) -> None:
    with pytest.raises(FedimprError, match=message):
        roll_call(Registry(partitions), 2, patience=0.1)


def test_the_roll_call_waits_for_late_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Registry({7: 0})
    monkeypatch.setattr(cohort, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: late.partitions.update({8: 1})))
    assert roll_call(late, 2) == {0: 7, 1: 8}
