"""Who the clients are, and what came back from them: nodes become partitions before anything is drawn, sent or summed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedimpr import seeds
from fedimpr.errors import FedimprError, UpdateError
from fedimpr.update import Update
from strategies.federation import Federation
from strategies.records import update_from_message


def roll_call(grid: Grid, clients: int, patience: float = 60.0) -> dict[int, int]:
    """Ask every node which partition it hosts; return ``{partition: node}`` in the order of partitions.

    Flower numbers nodes at random in each run and registers them while the server already runs, so both the waiting and the asking are
    needed for a run to repeat.

    Args:
        grid: the federation.
        clients: how many nodes must be there.
        patience: seconds to wait for them.

    Raises:
        FedimprError: too few nodes, or their partitions are not 0 ... clients - 1.
    """
    deadline = time.monotonic() + patience
    while len(nodes := list(grid.get_node_ids())) < clients:
        if time.monotonic() > deadline:
            raise FedimprError(
                f"{len(nodes)} of {clients} clients have registered", stage="roll call", remedy="Start as many nodes as 'clients'."
            )
        time.sleep(0.02)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes], timeout=patience)
    hosts = {}
    for reply in replies:
        if reply.has_error():
            raise FedimprError(f"a client cannot say who it is: {reply.error.reason}", stage="roll call")
        hosts[int(reply.content.config_records["who"]["partition-id"])] = reply.metadata.src_node_id  # type: ignore[arg-type]
    if sorted(hosts) != list(range(clients)):
        raise FedimprError(
            f"the nodes must host partitions 0 to {clients - 1}, one each",
            stage="roll call",
            value=sorted(hosts),
            remedy="Give every node its own partition-id, and as many nodes as 'clients'.",
        )
    return dict(sorted(hosts.items()))


def cohort_of(federation: Federation, hosts: Mapping[int, int], round: int) -> dict[int, int]:
    """The partitions that take part in a round, in order, and their nodes: all, or a cohort drawn uniformly without replacement."""
    if federation.cohort is None:
        return dict(hosts)
    chosen = torch.randperm(federation.clients, generator=seeds.generator(federation.seed, "cohort", round))[: federation.cohort]
    return {partition: hosts[partition] for partition in sorted(chosen.tolist())}


def collect(
    replies: Iterable[Message],
    asked: Mapping[int, int],
    round: int,
    reference: Callable[[int], Mapping[str, Tensor]],
    minimum: int,
    excluded: Callable[[UpdateError], None],
) -> Iterator[Update]:
    """The good updates of a round in the order of partitions; the others are reported and left out.

    A reply that comes before its turn is held back, so replies that come in order are in memory one at a time.

    Args:
        replies: in any order.
        asked: ``{partition: node}``.
        round: counted from 1.
        reference: a partition's expected state dict.
        minimum: of good updates.
        excluded: told the reason for every partition left out.

    Raises:
        UpdateError: after the last, if there were fewer than ``minimum``; the first exclusion is quoted.
    """
    good, bad = 0, list[UpdateError]()
    for partition, reply in _in_turn(replies, asked):
        try:
            if reply is None:
                raise UpdateError(
                    "no reply in time", client=partition, round=round, stage="local training", remedy="Raise strategy.timeout."
                )
            update = update_from_message(reply, partition, round)
            update.check(reference(partition))
        except UpdateError as error:
            bad.append(error)
            excluded(error)
        else:
            good += 1
            yield update
    if good < minimum:
        raise UpdateError(
            f"{good} good updates of {len(asked)}, below strategy.minimum_updates = {minimum}; first: {bad[0]}",
            round=round,
            stage="collecting updates",
        )


def _in_turn(replies: Iterable[Message], asked: Mapping[int, int]) -> Iterator[tuple[int, Message | None]]:
    """Every partition that was asked, in order, with its reply or nothing."""
    arriving, early = iter(replies), dict[int, Message]()
    for partition, node in sorted(asked.items()):
        while node not in early and (reply := next(arriving, None)) is not None:
            early[reply.metadata.src_node_id] = reply
        yield partition, early.pop(node, None)
