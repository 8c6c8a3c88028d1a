"""Who the clients are, and what came back from them: nodes become partitions before anything is drawn, sent or summed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedimpr.errors import FedimprError, UpdateError
from fedimpr.update import Update
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


def collect(
    replies: Iterable[Message],
    hosts: Mapping[int, int],
    round: int,
    reference: Callable[[int], Mapping[str, Tensor]],
    minimum: int,
    excluded: Callable[[UpdateError], None],
) -> list[Update]:
    """The good updates of a round in the order of partitions; the others are reported and left out.

    Args:
        replies: in any order.
        hosts: ``{partition: node}`` of all that were asked.
        round: counted from 1.
        reference: a partition's expected state dict.
        minimum: of good updates.
        excluded: told the reason for every partition left out.

    Raises:
        UpdateError: fewer than ``minimum`` good updates; the first exclusion is quoted.
    """
    answers = {reply.metadata.src_node_id: reply for reply in replies}
    good: list[Update] = []
    bad: list[UpdateError] = []
    for partition, node in sorted(hosts.items()):
        try:
            if node not in answers:
                raise UpdateError(
                    "no reply in time", client=partition, round=round, stage="local training", remedy="Raise strategy.timeout."
                )
            update = update_from_message(answers.pop(node), partition, round)
            update.check(reference(partition))
            good.append(update)
        except UpdateError as error:
            bad.append(error)
            excluded(error)
    if len(good) < minimum:
        raise UpdateError(
            f"{len(good)} good updates of {len(hosts)}, below strategy.minimum_updates = {minimum}; first: {bad[0]}",
            round=round,
            stage="collecting updates",
        )
    return good
