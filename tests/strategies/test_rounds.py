"""The loop of a federation, and how it waits."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import ConfigError, FedimprError, UpdateError
from fedimpr.update import Update
from sim import _flwr
from strategies import cohort
from strategies.cohort import cohort_of, collect, roll_call
from strategies.federation import Federation
from strategies.records import answer_to_record
from strategies.rounds import exchange
from strategies.tensors import to_arrays

_flwr.join(1, 1)


class SlowGrid:
    """Replies become ready after a number of seconds each; ``None`` is never."""

    def __init__(self, delays: list[float | None]) -> None:
        self.delays, self.start = delays, time.monotonic()

    def push_messages(self, messages) -> list[str]:
        self.messages = messages
        return [str(i) for i in range(len(messages))]

    def pull_messages(self, ids) -> list[Message]:
        ready = [(self.messages[int(i)], self.delays[int(i)]) for i in ids]
        return [self.reply(asked) for asked, delay in ready if delay is not None and time.monotonic() - self.start >= delay]

    def reply(self, asked: Message) -> Message:
        return Message(RecordDict(), reply_to=asked)


class LosingGrid(SlowGrid):
    """Its nodes are gone; it says so in its own name, as Flower does."""

    def reply(self, asked: Message) -> Message:
        return Message(Error(5, "Node Unavailable"), reply_to=Message(RecordDict(), 1, "train"))


def asking(nodes: int) -> list[Message]:
    return [Message(RecordDict(), 100 + i, "train") for i in range(nodes)]


def test_a_silent_client_costs_its_own_reply_only() -> None:
    seen: list[int] = []
    replies = list(exchange(SlowGrid([0.1, None, 0.0, 0.2]), asking(4), [1, 1, 3, 2], 0.4, lambda stage, done, total: seen.append(done)))
    assert [reply.metadata.src_node_id for reply in replies] == [100, 102, 103]
    assert seen == [0, 1, 1, 4, 6]  # clients, of which the third node has three


def test_a_node_that_is_gone_is_named() -> None:
    replies = exchange(LosingGrid([0.0, 0.0]), asking(2), [1, 1], 1.0, lambda *_: None)
    bad: list[UpdateError] = []
    with pytest.raises(UpdateError, match="0 good updates"):
        list(collect(replies, {100: [0], 101: [1]}, 3, lambda partition: {}, 1, bad.append))
    assert [str(error).split(". ")[0] for error in bad] == [
        f"client {i}, round 3, local training: the client failed: Node Unavailable" for i in (0, 1)
    ]


def test_a_silent_client_is_named() -> None:
    bad: list[UpdateError] = []
    with pytest.raises(
        UpdateError,
        match="0 good updates of 2, below strategy.minimum_updates = 1; first: client 0, round 3, local training: no reply in time",
    ):
        list(collect([], {11: [0], 12: [1]}, 3, lambda partition: {}, 1, bad.append))
    assert [error.client for error in bad] == [0, 1]


def answered(*partitions: int) -> Iterator[Message]:
    """Good updates of these partitions, of nodes 100 and up, one after another."""
    for partition in partitions:
        asked = Message(RecordDict(), 100 + partition, "train")
        _flwr.number(asked, f"m{partition}")
        yield Message(answer_to_record([Update(partition, 1, {"w": torch.zeros(1)}, 5)], {}, sums=False), reply_to=asked)


@given(st.permutations(range(6)))
def test_updates_come_out_in_the_order_of_partitions(arrival: list[int]) -> None:
    asked = {100 + partition: [partition] for partition in range(6)}
    answers = collect(answered(*arrival), asked, 1, lambda partition: {"w": torch.zeros(1)}, 6, lambda error: None)
    assert [answer.updates[0].partition for answer in answers] == list(range(6))


def test_replies_in_order_are_in_memory_one_at_a_time() -> None:
    """When an update comes out, no later reply has been asked for."""
    seen: list[int] = []
    watched = (seen.append(partition) or reply for partition, reply in enumerate(answered(0, 1, 2)))
    asked = {100 + partition: [partition] for partition in range(3)}
    for answer in collect(watched, asked, 1, lambda partition: {"w": torch.zeros(1)}, 3, lambda error: None):
        assert seen == list(range(answer.updates[0].partition + 1))


W = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("sums", "examples", "message"),
    [
        ({"w": torch.tensor([1.0, torch.nan], dtype=torch.float64)}, 3, "the sum of partitions 0 to 1: tensor 'w' is not finite"),
        ({"w": torch.zeros(3, dtype=torch.float64)}, 3, "the sum of partitions 0 to 1: tensor 'w' must be .2,. torch.float64"),
        ({"w": torch.zeros(2)}, 3, "the sum of partitions 0 to 1: tensor 'w' must be .2,. torch.float64"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, 0, "client 1, round 1, checking the update: the number of examples must be >= 1"),
    ],
)
def test_a_bad_sum_is_left_out_as_a_whole(sums: dict, examples: int, message: str) -> None:
    asked = Message(RecordDict(), 100, "train")
    _flwr.number(asked, "m")
    record = answer_to_record([Update(0, 1, W, 5), Update(1, 1, W, examples)], {}, sums=True)
    record["sum"] = to_arrays(sums)
    bad: list[UpdateError] = []
    (answer,) = collect([Message(record, reply_to=asked)], {100: [0, 1]}, 1, lambda _: W, 0, bad.append, sums=True)
    assert answer.updates == [] and len(bad) == 1 and re.search(message, str(bad[0]))


def federation(clients: int, cohort: int | None, clients_per_node: int = 1) -> Federation:
    return Federation(
        clients=clients, clients_per_node=clients_per_node, cohort=cohort, seed=0, settings="", build=None, reference=None,
        shape=(1, 1, 1), device=torch.device("cpu"),
        watch=None,
    )  # type: ignore[arg-type] # fmt: skip


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_a_cohort_is_drawn_without_replacement_and_repeats(clients: int, round: int, data: st.DataObject) -> None:
    cohort = data.draw(st.integers(1, clients))
    per = data.draw(st.integers(1, clients))
    asking = federation(clients, cohort, per)
    nodes = list(range(100, 100 + asking.nodes))
    asked = cohort_of(asking, nodes, round)
    chosen = [partition for partitions in asked.values() for partition in partitions]
    assert len(set(chosen)) == cohort and chosen == sorted(chosen)
    assert all(node == 100 + partition // per for node, partitions in asked.items() for partition in partitions)
    assert asked == cohort_of(asking, nodes, round)
    everyone = cohort_of(federation(clients, None, per), nodes, round)
    assert [partition for partitions in everyone.values() for partition in partitions] == list(range(clients)) and list(everyone) == nodes


def test_every_client_comes_as_often_as_any_other() -> None:
    """3 of 10 in 1,000 rounds: each is expected 300 times, with a deviation of sqrt(1000 * 0.3 * 0.7) = 14.5; five of them are 73."""
    times = Counter(partition for round in range(1000) for partition in cohort_of(federation(10, 3, 10), [7], round)[7])
    assert all(abs(times[partition] - 300) < 73 for partition in range(10))


def test_a_cohort_is_drawn_among_those_that_have_work() -> None:
    assert cohort_of(federation(10, None, 10), [7], 1, among=[2, 5, 9]) == {7: [2, 5, 9]}
    for round in range(20):
        (drawn,) = cohort_of(federation(10, 2, 10), [7], round, among=[2, 5, 9]).values()
        assert len(drawn) == 2 and {2, 5, 9}.issuperset(drawn)


@pytest.mark.parametrize(("cohort", "minimum"), [(None, 10), (4, 4), (4, 1), (4, None)])
def test_the_minimum_is_counted_within_the_cohort(cohort: int | None, minimum: int | None) -> None:
    federation(10, cohort).check_minimum(minimum)


@pytest.mark.parametrize(("cohort", "asked"), [(None, 11), (4, 5), (4, 0)])
def test_a_minimum_beyond_the_cohort_is_refused(cohort: int | None, asked: int) -> None:
    with pytest.raises(ConfigError, match=f"'strategy.minimum_updates' is {asked}; allowed: null or an integer in .1, {cohort or 10}."):
        federation(10, cohort).check_minimum(asked)


class Registry:
    """A grid whose nodes answer the roll call with the given partitions."""

    def __init__(self, partitions: dict[int, int | Error | None]) -> None:
        self.partitions = partitions  # None: there is no answer

    def get_node_ids(self) -> list[int]:
        return list(self.partitions)

    def send_and_receive(self, messages, *, timeout) -> list[Message]:
        replies = []
        for message in messages:
            if (answer := self.partitions[message.metadata.dst_node_id]) is None:
                continue
            _flwr.number(message, "m")
            content = answer if isinstance(answer, Error) else RecordDict({"who": ConfigRecord({"partition-id": answer})})
            replies.append(Message(content, reply_to=message))
        return replies


def test_nodes_are_told_apart_by_their_partitions_whatever_their_numbers() -> None:
    assert roll_call(Registry({700: 1, 5: 2, 90: 0}), 3) == [90, 700, 5]


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ({7: 0, 8: 0}, "must have the places 0 to 1, one each"),
        ({7: 0, 8: 5}, "must have the places 0 to 1, one each"),
        ({7: 0, 8: Error(1, "no partition-id")}, "a client cannot say who it is: no partition-id"),
        ({7: 0}, "1 of 2 nodes have registered"),
        ({7: 0, 8: None}, "1 of 2 nodes have answered within 180 s"),
    ],
)
def test_a_wrong_roll_is_an_error(partitions: dict, message: str) -> None:
    with pytest.raises(FedimprError, match=message):
        roll_call(Registry(partitions), 2, patience=0.1)


def test_the_roll_call_waits_for_late_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Registry({7: 0})
    monkeypatch.setattr(cohort, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: late.partitions.update({8: 1})))
    assert roll_call(late, 2) == [7, 8]
