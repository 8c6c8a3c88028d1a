"""Who the clients are, and what came back from them: nodes become partitions before anything is drawn, sent or summed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedimpr import seeds
from fedimpr.errors import FedimprError, UpdateError
from fedimpr.update import difference
from strategies.federation import Federation
from strategies.records import Answer, answer_from_message


def roll_call(grid: Grid, nodes: int, patience: float = 60.0, answering: float = 180.0) -> list[int]:
    """Ask every node for its place; return the nodes' ids in the order of places.

    Flower numbers nodes at random in each run and registers them while the server already runs, so both the waiting and the asking are
    needed for a run to repeat.

    Args:
        grid: the federation.
        nodes: how many must be there.
        patience: seconds to wait for them.
        answering: seconds to wait for their answers, the first of which waits for a process that imports PyTorch.

    Raises:
        FedimprError: too few nodes, too few answers, or places that are not 0 ... nodes - 1.
    """
    deadline = time.monotonic() + patience
    while len(there := list(grid.get_node_ids())) < nodes:
        if time.monotonic() > deadline:
            raise FedimprError(
                f"{len(there)} of {nodes} nodes have registered",
                stage="roll call",
                remedy="Start one for every clients_per_node of the 'clients'.",
            )
        time.sleep(0.02)
    replies = list(grid.send_and_receive([Message(RecordDict(), node, "query") for node in there], timeout=answering))
    if len(replies) < len(there):
        raise FedimprError(
            f"{len(replies)} of {len(there)} nodes have answered within {answering:g} s",
            stage="roll call",
            remedy="See whether their machine is busy with other work, or they are stuck.",
        )
    hosts = {}
    for reply in replies:
        if reply.has_error():
            raise FedimprError(f"a client cannot say who it is: {reply.error.reason}", stage="roll call")
        hosts[int(reply.content.config_records["who"]["partition-id"])] = reply.metadata.src_node_id  # type: ignore[arg-type]
    if sorted(hosts) != list(range(nodes)):
        raise FedimprError(
            f"the nodes must have the places 0 to {nodes - 1}, one each",
            stage="roll call",
            value=sorted(hosts),
            remedy="Give every node its own partition-id, and start one for every clients_per_node of the 'clients'.",
        )
    return [hosts[place] for place in range(nodes)]


def cohort_of(federation: Federation, nodes: Sequence[int], round: int, among: Collection[int] | None = None) -> dict[int, list[int]]:
    """Who takes part in a round: the partitions by node, both in order. All, or a cohort drawn uniformly without replacement.

    Of those ``among`` which it is drawn, and with devices of those that can be reached and have the memory.
    """
    everyone, fleet = list(range(federation.clients)), federation.fleet
    if federation.cohort is not None:
        everyone = torch.randperm(federation.clients, generator=seeds.generator(federation.seed, "cohort", round)).tolist()
    wanted = (partition for partition in everyone if among is None or partition in among)
    there = (partition for partition in wanted if fleet is None or (fleet.able(partition) and fleet.there(round, partition)))
    return by_node(federation, nodes, sorted(itertools.islice(there, federation.cohort)))


def by_node(federation: Federation, nodes: Sequence[int], partitions: Iterable[int]) -> dict[int, list[int]]:
    """Partitions by the node that hosts them, in their order."""
    hosted: dict[int, list[int]] = {}
    for partition in partitions:
        hosted.setdefault(nodes[partition // federation.clients_per_node], []).append(partition)
    return hosted


def node_of(reply: Message) -> int:
    """The node that a reply comes from."""
    return reply.metadata.src_node_id


def collect(
    replies: Iterable[Message],
    asked: Mapping[Any, Sequence[int]],
    round: int,
    reference: Callable[[int], Mapping[str, Tensor]],
    minimum: int,
    excluded: Callable[[UpdateError], None],
    *,
    sums: bool = False,
    left_out: Sequence[UpdateError] = (),
    address: Callable[[Message], Hashable] = node_of,
) -> Iterator[Answer]:
    """The nodes' answers, in the order of partitions, with the good updates of each; the others are reported and left out.

    A reply that comes before its turn is held back, so replies that come in order are in memory one at a time.

    Args:
        replies: in any order.
        asked: partitions by the address that their replies have.
        round: counted from 1.
        reference: a partition's expected state dict.
        minimum: of good updates.
        excluded: told the reason for every partition left out.
        sums: whether sums were asked for.
        left_out: why further clients of this round were not asked to train; they are reported already.
        address: of a reply.

    Raises:
        UpdateError: after the last, if there were fewer than ``minimum`` good updates; the first exclusion is quoted.
    """
    good, bad = 0, list(left_out)
    for partitions, reply in _in_turn(replies, asked, address):
        answer = _checked(reply, partitions, round, reference, sums=sums)
        for error in answer.errors:
            excluded(error)
        good, bad = good + len(answer.updates), [*bad, *answer.errors][:1]
        yield answer
    if good < minimum:
        raise UpdateError(
            f"{good} good updates of {sum(map(len, asked.values())) + len(left_out)}, below strategy.minimum_updates = {minimum}; "
            f"first: {bad[0]}",
            round=round,
            stage="collecting updates",
        )


def _checked(
    reply: Message | None, partitions: Sequence[int], round: int, reference: Callable[[int], Mapping[str, Tensor]], *, sums: bool
) -> Answer:
    """A node's answer without what cannot be used."""
    if reply is None:
        remedy = "Raise strategy.timeout."
        late = [UpdateError("no reply in time", client=p, round=round, stage="local training", remedy=remedy) for p in partitions]
        return Answer(updates=[], errors=late)
    answer = answer_from_message(reply, partitions, round, sums=sums)
    if answer.sums is not None:
        return _checked_sums(answer, answer.sums, reference(partitions[0]))
    good, errors = [], list(answer.errors)
    for update in answer.updates:
        try:
            update.check(reference(update.partition))
            good.append(update)
        except UpdateError as error:
            errors.append(error)
    return Answer(updates=good, errors=errors, sent=answer.sent)


def _checked_sums(answer: Answer, sums: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Answer:
    """The same of sums, which are good as a whole or not at all."""
    doubles = {name: torch.empty_like(tensor, dtype=torch.float64, device="meta") for name, tensor in reference.items()}
    try:
        for update in answer.updates:
            update.check({})  # it came without weights
        if answer.updates and (wrong := difference(sums, doubles)):
            problem, value, remedy = wrong
            first, last = answer.updates[0], answer.updates[-1]
            where = f"the sum of partitions {first.partition} to {last.partition}"
            raise UpdateError(f"{where}: {problem}", round=first.round, stage="checking the update", value=value, remedy=remedy)
        return answer
    except UpdateError as error:
        return Answer(updates=[], errors=[*answer.errors, error], sent=answer.sent)


def _in_turn(
    replies: Iterable[Message], asked: Mapping[Any, Sequence[int]], address: Callable[[Message], Hashable]
) -> Iterator[tuple[Sequence[int], Message | None]]:
    """The partitions of every address that was asked, in order, with its reply or nothing."""
    arriving, early = iter(replies), dict[Hashable, Message]()
    for place, partitions in asked.items():
        while place not in early and (reply := next(arriving, None)) is not None:
            early[address(reply)] = reply
        yield partitions, early.pop(place, None)
