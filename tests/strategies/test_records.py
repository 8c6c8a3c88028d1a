"""Updates become Flower records and back."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedimpr.errors import UpdateError
from fedimpr.update import Update
from sim import _flwr
from strategies.records import instruction, read_instruction, update_from_message, update_to_record

_flwr.join(1, 1)


def reply(content: RecordDict | Error) -> Message:
    asked = Message(RecordDict(), 7, "train")
    _flwr.number(asked, "m")
    return Message(content, reply_to=asked)


@given(hnp.arrays("float32", hnp.array_shapes(max_dims=3, max_side=4)), st.integers(1, 10**6), st.booleans())
def test_an_update_survives_the_journey(values, examples: int, counted: bool) -> None:
    weights = {"w": torch.from_numpy(values), "steps": torch.tensor(3)}
    counts = torch.tensor([1, 2]) if counted else None
    sent = Update(4, 2, weights, examples, {"loss": 0.5}, counts)
    got = update_from_message(reply(update_to_record(sent)), partition=4, round=2)
    assert (got.partition, got.round, got.examples, got.metrics) == (4, 2, examples, {"loss": 0.5})
    assert all(
        torch.equal(got.weights[k].nan_to_num(), weights[k].nan_to_num()) and got.weights[k].dtype == weights[k].dtype for k in weights
    )
    assert (got.label_counts is None) if counts is None else torch.equal(got.label_counts, counts)


def test_label_counts_travel_only_where_they_were_given() -> None:
    assert "label-counts" not in update_to_record(Update(0, 1, {"w": torch.zeros(1)}, 1))


def test_an_instruction_survives_the_journey() -> None:
    weights, round, settings = read_instruction(instruction({"w": torch.ones(2)}, 3, '{"seed": 1}'))
    assert torch.equal(weights["w"], torch.ones(2)) and (round, settings) == (3, '{"seed": 1}')
    assert read_instruction(instruction(None, 1, "{}"))[0] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Error(2, "the disk is full"), "client 5, round 2, local training: the client failed: the disk is full"),
        (RecordDict(), "client 5, round 2, reading the update: the reply cannot be read"),
        (
            RecordDict({"arrays": ArrayRecord({"w": torch.zeros(1)}), "metrics": MetricRecord({"loss": 1.0})}),
            "reading the update: .*num-examples",
        ),
    ],
)
def test_what_cannot_be_read_is_named(content, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        update_from_message(reply(content), partition=5, round=2)
