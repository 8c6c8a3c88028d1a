"""Updates become Flower records and back."""

from __future__ import annotations

import re

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedimpr.update import Update
from sim import _flwr
from strategies.records import Instruction, answer_from_message, answer_to_record

_flwr.join(1, 1)


def reply(content: RecordDict | Error) -> Message:
    asked = Message(RecordDict(), 7, "train")
    _flwr.number(asked, "m")
    return Message(content, reply_to=asked)


def sent(*updates: Update, sums: bool = False, **reasons: str) -> Message:
    return reply(answer_to_record(updates, {int(key.removeprefix("p")): reason for key, reason in reasons.items()}, sums=sums))


@given(hnp.arrays("float32", hnp.array_shapes(max_dims=3, max_side=4)), st.integers(1, 10**6), st.booleans())
def test_an_update_survives_the_journey(values, examples: int, counted: bool) -> None:
    weights = {"w": torch.from_numpy(values), "steps": torch.tensor(3)}
    counts = torch.tensor([1, 2]) if counted else None
    (got,) = answer_from_message(sent(Update(4, 2, weights, examples, {"loss": 0.5}, counts)), [4], 2, sums=False).updates
    assert (got.partition, got.round, got.examples, got.metrics) == (4, 2, examples, {"loss": 0.5})
    assert all(
        torch.equal(got.weights[k].nan_to_num(), weights[k].nan_to_num()) and got.weights[k].dtype == weights[k].dtype for k in weights
    )
    assert (got.label_counts is None) if counts is None else torch.equal(got.label_counts, counts)


def test_a_node_answers_for_all_its_partitions() -> None:
    one, two = (Update(p, 1, {"w": torch.tensor([float(p)])}, p) for p in (6, 8))
    answer = answer_from_message(sent(one, two, p7="the disk is full"), [6, 7, 8], 1, sums=False)
    assert [(update.partition, update.weights["w"].item(), update.examples) for update in answer.updates] == [(6, 6.0, 6), (8, 8.0, 8)]
    assert [str(error) for error in answer.errors] == [
        "client 7, round 1, local training: the client failed: the disk is full. Mend the cause, or lower strategy.minimum_updates "
        "to go on without it."
    ]


def test_a_sum_travels_without_its_updates() -> None:
    """6 * 1.5 + 8 * 2 = 25, of 14 examples; the metrics of each come along."""
    record = answer_to_record(
        [Update(6, 1, {"w": torch.tensor([1.5])}, 6, {"loss": 1.0}), Update(8, 1, {"w": torch.tensor([2.0])}, 8)], {}, sums=True
    )
    assert sorted(record) == ["metrics-6", "metrics-8", "sum"]
    answer = answer_from_message(reply(record), [6, 8], 1, sums=True)
    assert answer.sums is not None and answer.sums["w"].item() == 25.0 and sum(update.examples for update in answer.updates) == 14
    assert [(update.partition, update.weights, update.metrics) for update in answer.updates] == [(6, {}, {"loss": 1.0}), (8, {}, {})]


def test_a_sum_of_which_a_part_cannot_be_read_is_not_used() -> None:
    """Nobody can take that part out of it."""
    record = answer_to_record([Update(p, 1, {"w": torch.ones(1)}, 3) for p in (0, 1)], {2: "the disk is full"}, sums=True)
    del record["metrics-1"]
    answer = answer_from_message(reply(record), [0, 1, 2], 1, sums=True)
    assert answer.updates == [] and answer.sums is None
    assert [error.client for error in answer.errors] == [2, 0, 1]


def test_label_counts_travel_only_where_they_were_given() -> None:
    assert "label-counts-0" not in answer_to_record([Update(0, 1, {"w": torch.zeros(1)}, 1)], {}, sums=False)


def test_an_instruction_survives_the_journey() -> None:
    asked = Instruction(weights={"w": torch.ones(2)}, round=3, settings='{"seed": 1}', cohort=[2, 5], sums=True)
    got = Instruction.from_record(asked.to_record())
    assert torch.equal(got.weights["w"], torch.ones(2))
    assert (got.round, got.settings, got.cohort, got.sums, got.beside) == (3, '{"seed": 1}', (2, 5), True, {})


def test_what_clients_learn_from_beside_travels_in_its_own_types() -> None:
    images = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    asked = Instruction(weights={}, round=1, settings="{}", cohort=[0], sums=False, beside={"impressions/images": images})
    got = Instruction.from_record(asked.to_record()).beside
    assert list(got) == ["impressions/images"]
    assert got["impressions/images"].dtype == torch.uint8
    assert torch.equal(got["impressions/images"], images)


NOTHING = {"metrics-5": MetricRecord({"num-examples": 1})}


@pytest.mark.parametrize(
    ("content", "sums", "message"),
    [
        (Error(2, "the disk is full"), False, "client 5, round 2, local training: the client failed: the disk is full"),
        (RecordDict(), False, "client 5, round 2, reading the update: the reply cannot be read"),
        (RecordDict(NOTHING), False, "client 5, round 2, reading the update: the reply cannot be read: KeyError 'arrays-5'"),  # type: ignore[arg-type]
        (RecordDict(NOTHING), True, "client 5, round 2, reading the update: the reply cannot be read: KeyError 'sum'"),  # type: ignore[arg-type]
        (RecordDict({"metrics-5": MetricRecord({"loss": 1.0}), "arrays-5": ArrayRecord()}), False, "reading the update: .*num-examples"),
    ],
)
def test_what_cannot_be_read_is_named(content: RecordDict | Error, sums: bool, message: str) -> None:
    answer = answer_from_message(reply(content), [5], 2, sums=sums)
    assert answer.updates == [] and re.search(message, str(answer.errors[0]))
