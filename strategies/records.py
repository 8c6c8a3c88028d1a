"""The one place where updates become Flower records and back.

A node hosts one partition or several. It gets one instruction a round, trains those of its partitions that take part, and answers with
one record: all updates, or their sum.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedimpr.errors import UpdateError
from fedimpr.update import Average, Update
from strategies.tensors import from_arrays, size_of, to_arrays

REASONS = "failed"  # the record of partitions that failed, by number, each with the reason in one line


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What the server sends to every node of a round.

    Attributes:
        weights: the global ones.
        round: counted from 1.
        settings: the run's, as JSON.
        cohort: the partitions that take part, on whatever node.
        sums: whether a node answers with the sum of its updates instead of the updates.
        beside: what else clients learn from, by name: impressions, other models. Often nothing.
        work: what they are asked for where it is not plain training, in the strategy's own words.
    """

    weights: dict[str, Tensor]
    round: int
    settings: str
    cohort: Sequence[int]
    sums: bool
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    work: str = ""

    def to_record(self) -> RecordDict:
        """As Flower records: ``arrays``, ``config``, and ``beside`` where there is something."""
        config: dict[str, Any] = {"round": self.round, "settings": self.settings, "cohort": write_cohort(self.cohort), "sums": self.sums}
        config |= {"work": self.work} if self.work else {}
        beside = {"beside": to_arrays(dict(self.beside))} if self.beside else {}
        return RecordDict({"arrays": to_arrays(self.weights), "config": ConfigRecord(config), **beside})

    @classmethod
    def from_record(cls, content: RecordDict) -> Instruction:
        """What :meth:`to_record` gave."""
        records: Any = content  # not by its ``array_records``, which goes through them all each time
        config, beside = dict(records["config"]), from_arrays(records["beside"]) if "beside" in records else {}
        return cls(weights=from_arrays(records["arrays"]), beside=beside, **config | {"cohort": read_cohort(config["cohort"])})


def write_cohort(cohort: Iterable[int]) -> str:
    """A cohort as one value: Flower looks at each number of a list, for each client once more."""
    return " ".join(map(str, cohort))


@functools.lru_cache(maxsize=1)
def read_cohort(cohort: str) -> tuple[int, ...]:
    """What :func:`write_cohort` gave."""
    return tuple(map(int, cohort.split()))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one node sends back.

    Attributes:
        updates: the good ones, in the order of partitions; without weights where only their sum was asked for.
        sums: of those, weighted by their numbers of examples, in float64; ``None`` where they were not asked for.
        errors: why the other partitions have none.
        sent: the bytes of the tensors that came of each partition, whether they can be used or not; a sum's are shared by its partitions.
    """

    updates: Sequence[Update]
    sums: Mapping[str, Tensor] | None = None
    errors: Sequence[UpdateError] = field(default_factory=list)
    sent: Mapping[int, int] = field(default_factory=dict)


def answer_to_record(updates: Iterable[Update], reasons: Mapping[int, str], *, sums: bool) -> RecordDict:
    """An answer as Flower records.

    Of partition 3: ``metrics-3`` with ``num-examples``, ``label-counts-3`` where they are sent, and ``arrays-3``, or else one ``sum`` for
    all. With sums, one update is held at a time.

    Args:
        updates: in the order of partitions; read one by one.
        reasons: why a partition has none, in one line; filled while ``updates`` is read.
        sums: whether to send the sum alone.
    """
    record, total = RecordDict(), Average()
    for update in updates:
        metrics: dict[str, Any] = {"num-examples": update.examples, **update.metrics}
        record[f"metrics-{update.partition}"] = MetricRecord(metrics)
        if update.label_counts is not None:
            record[f"label-counts-{update.partition}"] = MetricRecord({"counts": update.label_counts.tolist()})
        if sums:
            total.add(update)
        else:
            record[f"arrays-{update.partition}"] = to_arrays(update.weights)
    if sums:
        record["sum"] = to_arrays(total.sums)
    if reasons:
        record[REASONS] = ConfigRecord({str(partition): reason for partition, reason in reasons.items()})
    return record


def answer_from_message(message: Message, partitions: Sequence[int], round: int, *, sums: bool) -> Answer:
    """The answer inside a node's reply; where it cannot be read, an error for each of the partitions that it was asked for."""
    if message.has_error():
        return Answer(updates=[], errors=[_failed(message.error.reason, partition, round) for partition in partitions])
    content: Any = message.content
    reasons = dict(content[REASONS]) if REASONS in content else {}
    trained = [partition for partition in partitions if str(partition) not in reasons]
    errors = [_failed(reasons[str(partition)], partition, round) for partition in partitions if str(partition) in reasons]
    sent = _sent(content, trained)
    if sums:  # as a whole or not at all: nobody can take a part out of it
        try:
            updates = [_update(content, partition, round, sums=True) for partition in trained]
            return Answer(updates=updates, sums=from_arrays(content["sum"]), errors=errors, sent=sent)
        except Exception as error:
            return Answer(updates=[], errors=[*errors, *(_unreadable(error, partition, round) for partition in trained)], sent=sent)
    updates = []
    for partition in trained:
        try:
            updates.append(_update(content, partition, round, sums=False))
        except Exception as error:
            errors.append(_unreadable(error, partition, round))
    return Answer(updates=updates, errors=errors, sent=sent)


def shared(total: int, partitions: Sequence[int]) -> dict[int, int]:
    """A number of bytes shared by partitions: evenly, and to the last byte."""
    return {
        partition: (place + 1) * total // len(partitions) - place * total // len(partitions) for place, partition in enumerate(partitions)
    }


def _sent(content: Any, partitions: Sequence[int]) -> dict[int, int]:
    """The bytes of each partition's tensors: its weights, its part of a sum, its label counts at eight bytes each."""

    def size(name: str) -> int:
        return size_of(content[name]) if isinstance(content.get(name), ArrayRecord) else 0

    sent = shared(size("sum"), partitions)
    for partition in partitions:
        counts = content.get(f"label-counts-{partition}", {}).get("counts", ())
        sent[partition] += size(f"arrays-{partition}") + 8 * (len(counts) if isinstance(counts, Sequence) else 0)
    return sent


def _update(content: Any, partition: int, round: int, *, sums: bool) -> Update:
    metrics = dict(content[f"metrics-{partition}"])
    weights = {} if sums else from_arrays(content[f"arrays-{partition}"])
    counts = content[key]["counts"] if (key := f"label-counts-{partition}") in content else None
    examples = int(metrics.pop("num-examples"))
    scalars = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return Update(partition, round, weights, examples, scalars, None if counts is None else torch.tensor(counts))


def _failed(reason: str | None, partition: int, round: int) -> UpdateError:
    remedy = "Mend the cause, or lower strategy.minimum_updates to go on without it."
    return UpdateError(f"the client failed: {reason}", client=partition, round=round, stage="local training", remedy=remedy)


def _unreadable(error: Exception, partition: int, round: int) -> UpdateError:
    problem, remedy = f"the reply cannot be read: {type(error).__name__} {error}", "Client and server must run the same release."
    return UpdateError(problem, client=partition, round=round, stage="reading the update", remedy=remedy)
