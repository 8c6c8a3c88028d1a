"""The one place where updates become Flower records and back."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedimpr.errors import UpdateError
from fedimpr.update import Update


def instruction(weights: dict[str, Tensor] | None, round: int, settings: str) -> RecordDict:
    """What the server sends to train: the global weights (none where a client's architecture is its own), the round and the run's
    settings as JSON.
    """
    config = ConfigRecord({"round": round, "settings": settings})
    return RecordDict({"config": config} if weights is None else {"arrays": ArrayRecord(weights), "config": config})


def read_instruction(content: RecordDict) -> tuple[dict[str, Tensor] | None, int, str]:
    """The three parts of :func:`instruction`."""
    weights = content.array_records["arrays"].to_torch_state_dict() if "arrays" in content.array_records else None
    config: Any = content.config_records["config"]
    return weights, int(config["round"]), str(config["settings"])


def update_to_record(update: Update) -> RecordDict:
    """An update as Flower records: ``arrays``, ``metrics`` with ``num-examples``, and ``label-counts`` where they are sent."""
    metrics: dict[str, Any] = {"num-examples": update.examples, **update.metrics}
    record = RecordDict({"arrays": ArrayRecord(update.weights), "metrics": MetricRecord(metrics)})
    if update.label_counts is not None:
        record["label-counts"] = MetricRecord({"counts": update.label_counts.tolist()})
    return record


def update_from_message(message: Message, partition: int, round: int) -> Update:
    """The update inside a client's reply.

    Raises:
        UpdateError: the reply is an error, or a record or value is missing.
    """
    if message.has_error():
        raise UpdateError(
            f"the client failed: {message.error.reason}",
            client=partition,
            round=round,
            stage="local training",
            remedy="Mend the cause, or lower strategy.minimum_updates to go on without it.",
        )
    try:
        content = message.content
        metrics: Any = dict(content.metric_records["metrics"])
        weights = content.array_records["arrays"].to_torch_state_dict()
        counts: Any = content.metric_records["label-counts"]["counts"] if "label-counts" in content.metric_records else None
        examples = int(metrics.pop("num-examples"))
    except Exception as error:
        raise UpdateError(
            f"the reply cannot be read: {type(error).__name__} {error}",
            client=partition,
            round=round,
            stage="reading the update",
            remedy="Client and server must run the same release.",
        ) from error
    scalars = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return Update(partition, round, weights, examples, scalars, None if counts is None else torch.tensor(counts))
