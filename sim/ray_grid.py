"""Flower's ``Grid`` over Ray workers: clients run side by side, on this machine or on a cluster."""

from __future__ import annotations

import copy
import importlib
import math
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict, UserConfigValue

from fedimpr.errors import FedimprError
from sim import _flwr
from sim.environment import hold_memory
from sim.grid import OUT_OF_MEMORY, OwnGrid, answer, make_contexts
from sim.pool import Kind, Pool, Turn, one_line

PULL_SECONDS = 1.0  # that a pull waits for the first reply: who asks again and again loses no time in between, and is not kept long
REASONS = "failed"  # strategies.records.REASONS, whose module imports PyTorch
CPU, GPU = "cpu", "gpu"  # kinds of workers: without a share of a GPU, and with one
KEPT = 4  # contents that a worker remembers; a round has two, with and without weights

PROJECT = Path(__file__).resolve().parents[1]


class Worker:
    """A process that plays clients, one turn at a time.

    Args:
        client_app: ``"module:name"`` of the app that every client runs.
        nodes: as for the grid.
        run_config: as for the grid.
        tree: the folder that this code has to come from; ``None`` takes any.
        gpu: whether it has a share of one; without, it sees none.
    """

    def __init__(
        self, client_app: str, nodes: int, run_config: Mapping[str, UserConfigValue], tree: Path | None, *, gpu: bool = False
    ) -> None:
        if tree not in (None, PROJECT):
            raise FedimprError("the workers import fedimpr from another folder", value=str(PROJECT), remedy="Start from another folder.")
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        hold_memory()
        import torch  # by workers only: the server starts them before it imports what takes long

        torch.set_num_threads(1)  # until a client asks for others
        module, _, name = client_app.partition(":")
        self._app = getattr(importlib.import_module(module), name)
        self._contexts = make_contexts(nodes, run_config)
        self._contents: OrderedDict[Any, RecordDict] = OrderedDict()

    def up(self) -> None:
        """Answered as soon as the worker can be."""

    def turn(self, message: Message, shared: list[Any], state: RecordDict | None) -> tuple[float, tuple[Message, RecordDict | None]]:
        """One client's turn.

        Args:
            message: without its content where that is shared.
            shared: a reference to the content, or nothing.
            state: the client's, from its last turn; ``None`` is an empty one.

        Returns:
            The seconds that the client took, its reply and its new state.
        """
        if shared:
            message.content = self._content(shared[0])
        context: Context = self._contexts[message.metadata.dst_node_id]
        context.state = state or RecordDict()
        start = time.perf_counter()
        reply = answer(self._app, message, context)
        left, context.state = context.state, RecordDict()  # it goes along: a worker keeps nothing of a client
        if why := _ran_out(reply):
            raise MemoryError(why)  # the pool replaces a process that is at its limit
        return time.perf_counter() - start, (reply, left or None)

    def errand(self, *errand: Any) -> tuple[float, bool]:
        """A piece of the server's own work, see :func:`sim.errands.run_errand`; the seconds that it took."""
        from sim.errands import run_errand

        start = time.perf_counter()
        run_errand(*errand)
        return time.perf_counter() - start, True

    def _content(self, reference: Any) -> RecordDict:
        if reference.binary() not in self._contents:
            self._contents[reference.binary()] = ray.get(reference)
            if len(self._contents) > KEPT:
                self._contents.popitem(last=False)
        return self._contents[reference.binary()]


def _ran_out(reply: Message) -> str | None:
    """That a node ran out of memory, where none of its clients has an update."""
    if reply.has_error():
        reasons = [reply.error.reason or ""]
    else:
        content = reply.content
        reasons = [] if content.metric_records else list(map(str, content.config_records.get(REASONS, ConfigRecord()).values()))
    return next((one for one in reasons if one.startswith(OUT_OF_MEMORY)), None)


@dataclass(kw_only=True, eq=False)
class _Letter:
    """A message on its way."""

    message: Message
    shared: list[Any]
    turn: Turn | None = None  # once the messages before it to the same node are answered


class RayGrid(OwnGrid):
    """The clients of a federation, played by a pool of Ray workers; Ray has to be running. Use it in a ``with`` block.

    Messages to one node are answered one after another, in the order in which they were sent, and a client's state travels with them;
    so it does not matter which worker takes which. Content that several messages of a push share is sent once. What a client took last
    time predicts what it takes next, and the longest turns are dealt first.

    A client whose turn has taken two workers along answers with an error.

    Args:
        client_app: ``"module:name"`` of the app that every client runs; workers import it.
        nodes: see :class:`sim.grid.OwnGrid`.
        run_config: see :class:`sim.grid.OwnGrid`.
        workers: how many, >= 1.
        cpus: that Ray sets aside for each, > 0.
        gpus: the same, >= 0.
        cpu_workers: how many more, without a share of a GPU, >= 0.
        turn_seconds: a turn that takes longer is taken for hung, and its worker is killed.
        variables: environment variables of the workers, besides those that Ray itself has.
        tree: the folder that the workers' code has to come from; ``None`` takes any.
    """

    def __init__(
        self,
        client_app: str,
        nodes: int,
        run_config: Mapping[str, UserConfigValue],
        *,
        workers: int,
        cpus: float,
        gpus: float,
        cpu_workers: int = 0,
        turn_seconds: float,
        variables: Mapping[str, str],
        tree: Path | None,
    ) -> None:
        super().__init__(nodes, run_config)
        environment: dict[str, Any] = {"env_vars": dict(variables)} if variables else {}

        def kind(name: str, workers: int, gpus: float) -> Kind:
            actor = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env=environment)(Worker)
            given = (client_app, nodes, dict(run_config), tree)
            return Kind(name=name, start=lambda: actor.remote(*given, gpu=gpus > 0), workers=workers)

        kinds = [kind(GPU if gpus else CPU, workers, gpus), *([kind(CPU, cpu_workers, 0)] if cpu_workers else [])]
        self._pool = Pool(kinds, turn_seconds)
        self._lines: dict[int, deque[_Letter]] = {}  # by node; the first letter of each is at work
        self._letters: dict[Turn, _Letter] = {}
        self._replies: dict[str, Message | None] = {}  # by message; nothing before the reply is there
        self._seen: dict[tuple[int, str], tuple[float, str | None]] = {}  # by node and type of message: its last turn, and on which kind

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.close()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages and return their ids; workers begin with them.

        Raises:
            FedimprError: a message goes to a node that is not there, or Ray has no room for its content.
        """
        numbered = self._numbered(messages)
        uses = Counter(id(message.content) for message in numbered.values())
        shared: dict[int, list[Any]] = {}
        for message in numbered.values():
            key = id(message.content)
            if key not in shared:
                with one_line():
                    shared[key] = [ray.put(message.content)] if uses[key] > 1 else []
            self._lines.setdefault(message.metadata.dst_node_id, deque()).append(_Letter(message=message, shared=shared[key]))
        self._replies |= dict.fromkeys(numbered)
        self._begin(message.metadata.dst_node_id for message in numbered.values())
        return list(numbered)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to the messages with these ids that are there, in this order; an id that is unknown or was pulled before is passed
        over. It waits a moment for the first of them.
        """
        asked, deadline = [i for i in message_ids if i in self._replies], time.monotonic() + PULL_SECONDS
        self._advance(0.0)
        while asked and self._replies[asked[0]] is None and (left := deadline - time.monotonic()) > 0:
            self._advance(left)
        there = [i for i in asked if self._replies[i] is not None]
        return [reply for i in there if (reply := self._replies.pop(i)) is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies in the same order.

        Args:
            messages: at most one turn of work each.
            timeout: seconds; no further client starts once they have passed, and the replies so far are returned.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        while any(self._replies[i] is None for i in ids) and (left := deadline - time.monotonic()) > 0:
            self._advance(left)
        replies = {i: self._replies.pop(i) for i in ids}
        self._withdraw({i for i, reply in replies.items() if reply is None})
        return [reply for reply in replies.values() if reply is not None]

    def do_errands(self, errands: Sequence[tuple[Any, ...]], look: Callable[[], None]) -> list[str | None]:
        """Do pieces of the server's own work side by side, see :class:`sim.errands.Errands`. No piece is taken for hung, and each is done
        by a worker that computes on what the server does.
        """
        turns = [
            Turn(arguments=errand, predicted=math.inf, only=GPU if errand[2] == "cuda" else CPU, method="errand", limited=False)
            for errand in errands
        ]
        self._pool.add(turns)
        while any(turn.result is None and turn.failure is None for turn in turns):
            self._advance(PULL_SECONDS)
            look()
        return [turn.failure for turn in turns]

    def _begin(self, nodes: Iterable[int]) -> None:
        """Hand the first letter of each node's line to the pool, where it is not there yet."""
        turns = []
        for node in nodes:
            line = self._lines[node]
            if line and line[0].turn is None:
                letter = line[0]
                bare = copy.copy(letter.message)
                if letter.shared:
                    bare.content = RecordDict()
                predicted, seen_on = self._seen.get((node, bare.metadata.message_type), (None, None))
                state = RecordDict(dict(self._contexts[node].state))
                self._bring(letter.message, state)
                letter.turn = Turn(arguments=(bare, letter.shared, state or None), predicted=predicted, seen_on=seen_on)
                self._letters[letter.turn] = letter
                turns.append(letter.turn)
        if turns:
            self._pool.add(turns)

    def _advance(self, timeout: float) -> None:
        """Take in what the workers have finished, and keep them busy; wait at most ``timeout`` seconds for the first."""
        nodes = []
        for turn in self._pool.finished(timeout):
            letter = self._letters.pop(turn, None)
            if letter is None:
                continue  # an errand
            metadata = letter.message.metadata
            nodes.append(metadata.dst_node_id)
            self._lines[metadata.dst_node_id].popleft()
            if turn.failure is None:
                reply, state = turn.result
                self._contexts[metadata.dst_node_id].state = state or RecordDict()
                self._take(letter.message, self._contexts[metadata.dst_node_id].state)
                if turn.seconds is not None:
                    self._seen[metadata.dst_node_id, metadata.message_type] = turn.seconds, turn.done_on
            else:
                reply = Message(Error(_flwr.CLIENT_APP_RAISED, turn.failure), reply_to=letter.message)
            if metadata.message_id in self._replies:  # else nobody waits for it any more
                self._replies[metadata.message_id] = reply
        self._begin(nodes)

    def _withdraw(self, message_ids: Collection[str]) -> None:
        """Let no client start on these messages any more."""
        for line in self._lines.values():
            for letter in [one for one in line if one.message.metadata.message_id in message_ids]:
                if letter.turn is None:
                    line.remove(letter)
                elif self._pool.withdraw(letter.turn):
                    line.remove(letter)
                    del self._letters[letter.turn]
        self._begin(list(self._lines))
